"""Builds the assistant's input from the base's prompts: decoding, templates, tokenization, padding. Runs no model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..config import SoftCoTConfig
from .fixed_date import FIXED_DATE
from .frozen_lm import FrozenLM

# A user message that shows whether a chat template changes, truncates or drops text.
_PROBE = " \"Is 3 < 4 && x_1 == 'é'?\" <b>No:</b>\n\n\t- {{ a }} \\n\n" + "  Tom has 12 apples, and eats 7.\n" * 300
_RARE_CHARACTER = "\N{CUNEIFORM SIGN A}"  # only byte-level tokenizers have tokens for it
_USE_ANOTHER = "Give another one with `use_assistant(model, tokenizer, name=...)`"


@dataclass
class PromptReader:
    """Builds the assistant's input for one adapter."""

    config: SoftCoTConfig  # the adapter's config
    assistant: FrozenLM
    base_tokenizer: PreTrainedTokenizerBase | None  # `None`: the assistant reads the base's ids
    assistant_thought_token_id: int  # token at the thought positions of the assistant's input
    in_parts: bool = False  # whether the assistant's chat template takes content as a list of parts
    _warned: bool = field(default=False, init=False, repr=False)

    def read(self, prompt_ids: Tensor, prompt_mask: Tensor, num_thoughts: int) -> tuple[Tensor, Tensor]:
        """Build the assistant's input for the prompts of a batch.

        Args:
            prompt_ids: `(B, P)` ids of the base. Prompts end in the last column.
            prompt_mask: `(B, P)`, 1 = part of the prompt.
            num_thoughts: N.

        Returns:
            Ids and mask, both `(B, P' + N)`, left-padded. The last N columns are the thought positions.

        Raises:
            ValueError: A tokenizer or an embedding lacks a token of a prompt, or a chat template changes a prompt.
        """
        if self.base_tokenizer is not None:
            texts = self._decode(self.base_tokenizer, prompt_ids, prompt_mask)
            with self.assistant.lock:
                prompt_ids, prompt_mask = self._encode(texts, num_thoughts)
        elif len(self._known_ids) < self._known_limit:  # gaps that `shared_vocabulary` does not show
            self._check_known_ids(self.assistant.tokenizer, _unpadded(prompt_ids, prompt_mask))
        size = (prompt_ids.shape[0], num_thoughts)
        thoughts = prompt_ids.new_full(size, self.assistant_thought_token_id)
        return torch.cat([prompt_ids, thoughts], 1), torch.cat([prompt_mask, prompt_mask.new_ones(size)], 1)

    @property
    def shared_vocabulary(self) -> int | None:
        """Number of base ids that the assistant's tokenizer and embeddings cover; `None` if it reads text."""
        return None if self.base_tokenizer is not None else min(self.assistant.vocabulary, self._known_limit)

    @cached_property
    def _known_ids(self) -> frozenset[int]:
        """Ids that the base's tokenizer, or the assistant's if it reads ids, has tokens for."""
        tokenizer = self.assistant.tokenizer if self.base_tokenizer is None else self.base_tokenizer
        return frozenset(tokenizer.get_vocab().values())

    @cached_property
    def _known_limit(self) -> int:
        """The largest known id, plus one."""
        return max(self._known_ids) + 1

    def _check_known_ids(self, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> None:
        """Reject ids that a tokenizer has no token for; decoding would drop them."""
        found = set().union(*rows)
        if not found <= self._known_ids:
            self.__dict__.pop("_known_ids", None)  # tokens may have been added since
        if unknown := sorted(found - self._known_ids):
            raise ValueError(
                f"`input_ids` must be known to the tokenizer that reads the prompts, {tokenizer.name_or_path!r}, got "
                f"{unknown[:5]}, which it has no token for. If they are tokens added in memory, call "
                "`use_tokenizer(tokenizer)` before the adapter is attached; or save the tokenizer, and set "
                "`tokenizer_name_or_path` to its folder."
            )

    def _decode(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Tensor, prompt_mask: Tensor) -> list[str]:
        """Decode prompts without the base's special tokens, or what stands between two delimiters in them."""
        rows, between = _unpadded(prompt_ids, prompt_mask), self.config.assistant_prompt_between
        self._check_known_ids(tokenizer, rows)
        keep = between is not None  # delimiters may be special tokens
        texts = tokenizer.batch_decode(rows, skip_special_tokens=not keep, clean_up_tokenization_spaces=False)
        return texts if between is None else [_between(text, row, *between) for row, text in enumerate(texts)]

    def _encode(self, texts: list[str], num_thoughts: int) -> tuple[Tensor, Tensor]:
        """Apply `assistant_prompt` and the chat template, tokenize for the assistant, and pad on the left."""
        tokenizer, limit = self.assistant.tokenizer, self.assistant.vocabulary
        special = list(tokenizer.get_added_vocab())
        rows = self._ids(
            [self._render(text, num_thoughts) for text in texts], add_special_tokens=not self._uses_chat_template
        )
        for row, text in enumerate(texts):
            if any(token in text for token in special):
                rows[row] = self._encode_as_text(text, num_thoughts)
        if not self._uses_chat_template:
            end = _num_end_tokens(tokenizer)
            rows = [row[: len(row) - end] for row in rows]
        if (largest := max(map(max, filter(None, rows)), default=0)) >= limit:
            raise ValueError(
                f"The assistant must have an embedding for every token of its tokenizer, but {self.assistant.name!r} "
                f"has {limit}, and the prompts hold id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}). Give "
                "the tokenizer that it was trained with to `use_assistant(model, tokenizer, name=...)`."
            )
        self._warn_dropped(texts)
        ids = [torch.tensor(row, dtype=torch.long) for row in rows]
        padding = tokenizer.pad_token_id  # masked, so any id with an embedding works
        padding = padding if padding is not None and padding < limit else 0
        return (
            pad_sequence(ids, batch_first=True, padding_value=padding, padding_side="left"),
            pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left"),
        )

    def _ids(self, texts: list[str], **options: bool) -> list[list[int]]:
        """Tokenize whole texts, regardless of the padding and truncation that the tokenizer was saved with."""
        return list(self.assistant.tokenizer(texts, padding=False, truncation=False, **options)["input_ids"])

    def _warn_dropped(self, texts: list[str]) -> None:
        """Warn once about words that the assistant's tokenizer has no tokens for."""
        if self._warned or not self._drops_words:
            return
        if lost := self._dropped_words(dict.fromkeys(word for text in texts for word in text.split())):
            self._warned = True
            words = [word[:30] for word in lost[:10]]
            warnings.warn(
                f"The tokenizer of the assistant {self.assistant.name!r} has no tokens for {words}, so that the "
                "assistant reads prompts without them. Other prompts may lose words without another warning. Choose "
                "an assistant whose tokenizer knows the language and the symbols of the prompts.",
                stacklevel=2,
            )

    @cached_property
    def _drops_words(self) -> bool:
        """Whether the assistant's tokenizer drops any text; byte-level tokenizers do not."""
        return bool(self._dropped_words([_RARE_CHARACTER]))

    def _dropped_words(self, words: Iterable[str]) -> list[str]:
        """Return the words that the assistant's tokenizer drops or maps to unk, both alone and after a space."""
        lost, unknown = list(words), self.assistant.tokenizer.unk_token_id
        for space in ("", " "):  # some vocabularies have words only with the space before them
            texts = [space + word for word in lost]
            rows = self._ids(texts, add_special_tokens=False, split_special_tokens=True) if texts else []
            lost = [word for word, row in zip(lost, rows, strict=True) if not row or unknown in row]
        return lost

    @property
    def _uses_chat_template(self) -> bool:
        """Whether prompts go through the assistant's chat template, which writes special tokens itself."""
        return self.config.assistant_prompt is not None and self.assistant.tokenizer.chat_template is not None

    def _render(self, text: str, num_thoughts: int, once: bool = False) -> str:
        """Render what the assistant reads for a prompt, including the generation prompt."""
        template = self.config.assistant_prompt
        if template is not None:
            template = template.replace("{num_thought_tokens}", str(num_thoughts))
            text = template.replace("{prompt}", text)
        prefix = (self.config.assistant_prefix or "").replace("{num_thought_tokens}", str(num_thoughts))
        if not self._uses_chat_template:
            return text + prefix
        content: Any = [{"type": "text", "text": text}] if self.in_parts else text
        message, tokenizer = [{"role": "user", "content": content}], self.assistant.tokenizer
        try:
            chat = tokenizer.get_chat_template()
            chat = FIXED_DATE + chat if "strftime_now" in chat else chat
            rendered = str(
                tokenizer.apply_chat_template(message, chat_template=chat, add_generation_prompt=True, tokenize=False)
            )
        except Exception as error:  # untrusted templates, run in transformers' sandbox
            raise ValueError(
                f"The chat template of the assistant {self.assistant.name!r} cannot be rendered: {error} "
                f"{_USE_ANOTHER}, or leave `assistant_prompt` out."
            ) from error
        found = rendered.count(text.strip())
        if found == 0 or (once and found > 1):
            raise ValueError(
                f"The chat template of the assistant {self.assistant.name!r} must write the user's turn as it is, and "
                f"once, but changes, cuts, drops or repeats it. {_USE_ANOTHER}, or leave `assistant_prompt` out."
            )
        return rendered + prefix

    def check_chat_template(self) -> None:
        """Detect whether the assistant's chat template, if it is used, takes content as a string or as parts."""
        if not self._uses_chat_template:
            return
        try:
            self._render(_PROBE, self.config.num_thought_tokens, once=True)
        except ValueError as error:
            self.in_parts = True
            try:
                self._render(_PROBE, self.config.num_thought_tokens, once=True)
            except ValueError:
                raise error from None

    def _encode_as_text(self, text: str, num_thoughts: int) -> list[int]:
        """Encode a prompt that contains special tokens of the assistant as text: as letters, not as special tokens."""
        if not self._uses_chat_template:
            return self._ids([self._render(text, num_thoughts)], split_special_tokens=True)[0]
        # Only the templates' own text, around the prompt, may become special tokens.
        before, *after = self._render("\u0001", num_thoughts).split("\u0001")
        (content,) = self._ids([text], add_special_tokens=False, split_special_tokens=True)
        ids, *rest = self._ids([before, *after], add_special_tokens=False)
        return ids + [token_id for piece in rest for token_id in (*content, *piece)]


def _between(text: str, row: int, before: str, after: str) -> str:
    """Return what stands between two delimiters in the prompt of a row.

    Raises:
        ValueError: One of them does not occur, or more than once, or they stand in the other order.
    """
    for delimiter in (before, after):
        if text.count(delimiter) != 1:
            raise ValueError(
                "`assistant_prompt_between` must name two texts that occur once in every prompt, before the thoughts, "
                f"but {delimiter!r} occurs {text.count(delimiter)} times in row {row}. Choose others."
            )
    start, end = text.index(before) + len(before), text.index(after)
    if end < start:
        raise ValueError(
            f"`assistant_prompt_between` must name what stands before the question first, but {after!r} stands before "
            f"{before!r} in row {row}. Exchange the two."
        )
    return text[start:end]


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Return the attended ids of each row."""
    return [row.tolist() for row in ids[mask.bool()].split(mask.sum(1).tolist())]


def _num_end_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens, such as EOS, that a tokenizer appends. Thoughts follow the text without them."""
    added = tokenizer("a", padding=False, truncation=False, return_special_tokens_mask=True)["special_tokens_mask"]
    return int(added[::-1].index(0)) if 0 in added else 0
