"""Turns the base's prompts into the assistant's input: ids, text, template, padding. Runs no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ._compat import is_empty
from .assistant import Assistant
from .config import SoftCoTConfig
from .lookup import ThoughtLookup


@dataclass
class PromptReader:
    """What one adapter needs to make the assistant's input.

    Args:
        config: The adapter's config.
        assistant: The assistant.
        base_tokenizer: The base's tokenizer, or `None` where the prompt's ids are fed as they are.
        thought_token_id: Id of `thought_token` in the base's vocabulary, or `None`.
        assistant_thought_token_id: What stands at the thought positions of the assistant's input.
        lookup: Where the assistant's hidden states are looked up before it runs, or `None`.
    """

    config: SoftCoTConfig
    assistant: Assistant
    base_tokenizer: PreTrainedTokenizerBase | None
    thought_token_id: int | None
    assistant_thought_token_id: int
    lookup: ThoughtLookup | None = None

    def read(self, prompt_ids: Tensor, prompt_mask: Tensor, num_thoughts: int) -> tuple[Tensor, Tensor]:
        """Make the assistant's input from the prompts of a batch.

        Args:
            prompt_ids: `(B, P)` ids of the base, the prompts' ends in the last column.
            prompt_mask: `(B, P)`, 1 = part of the prompt.
            num_thoughts: N.

        Returns:
            Ids and mask, both `(B, P' + N)`, left-padded, the last N columns being the thought positions.
        """
        if self.base_tokenizer is not None:
            texts = self._decode(prompt_ids, prompt_mask)
            with self.assistant.lock:
                prompt_ids, prompt_mask = self._encode(texts, num_thoughts)
        size = (prompt_ids.shape[0], num_thoughts)
        thoughts = prompt_ids.new_full(size, self.assistant_thought_token_id)
        return torch.cat([prompt_ids, thoughts], 1), torch.cat([prompt_mask, prompt_mask.new_ones(size)], 1)

    def _decode(self, prompt_ids: Tensor, prompt_mask: Tensor) -> list[str]:
        """The prompts' text, without the base's special tokens."""
        tokenizer = self.base_tokenizer
        if tokenizer is None:
            raise RuntimeError("The prompt's ids are fed as they are; there is nothing to decode.")
        rows = prompt_ids[prompt_mask.bool()].split(prompt_mask.sum(1).tolist())
        return tokenizer.batch_decode([row.tolist() for row in rows], skip_special_tokens=True)

    def _encode(self, texts: list[str], num_thoughts: int) -> tuple[Tensor, Tensor]:
        """Tokenize for the assistant, through the template and its chat template, and pad on the left."""
        tokenizer = self.assistant.tokenizer
        special = list(tokenizer.get_added_vocab())
        rendered = [self._render(text, num_thoughts) for text in texts]
        rows = list(tokenizer(rendered, add_special_tokens=not self._chats)["input_ids"])
        for row, text in enumerate(texts):
            if any(token in text for token in special):
                rows[row] = self._encode_spelled(text, num_thoughts)
        if not self._chats:
            end = _num_end_tokens(tokenizer)
            rows = [row[: len(row) - end] for row in rows]
        ids = [torch.tensor(row, dtype=torch.long) for row in rows]
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        return (
            pad_sequence(ids, batch_first=True, padding_value=padding, padding_side="left"),
            pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left"),
        )

    @property
    def _chats(self) -> bool:
        """Whether the assistant reads a user turn of its chat template, which writes special tokens itself."""
        return self.config.assistant_prompt is not None and self.assistant.tokenizer.chat_template is not None

    def _render(self, text: str, num_thoughts: int) -> str:
        """The text that the assistant reads for a prompt, up to where its answer begins."""
        template = self.config.assistant_prompt
        if template is not None:
            template = template.replace("{num_thought_tokens}", str(num_thoughts))
            text = template.replace("{prompt}", text)
        if not self._chats:
            return text
        message = [{"role": "user", "content": text}]
        tokenizer = self.assistant.tokenizer
        try:
            return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # templates come with assistants, and run in transformers' sandbox
            raise ValueError(
                f"The chat template of the assistant {self.assistant.name!r} cannot be rendered: {error} Give another "
                "one with `use_assistant(model, tokenizer, name=...)`, or leave `assistant_prompt` out."
            ) from error

    def _encode_spelled(self, text: str, num_thoughts: int) -> list[int]:
        """Encode a prompt that spells special tokens of the assistant: it gets their letters, not the tokens."""
        tokenizer = self.assistant.tokenizer
        if not self._chats:
            return list(tokenizer(self._render(text, num_thoughts), split_special_tokens=True)["input_ids"])
        # Only the templates' own text around the prompt may become special tokens.
        before, *after = self._render("\u0001", num_thoughts).split("\u0001")
        content = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = list(tokenizer(before, add_special_tokens=False)["input_ids"])
        for piece in after:
            ids += [*content, *tokenizer(piece, add_special_tokens=False)["input_ids"]]
        return ids


def _num_end_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens, such as EOS, a tokenizer puts after every text; the thoughts continue the text itself."""
    added = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return int(added[::-1].index(0)) if 0 in added else 0


def make_reader(config: SoftCoTConfig, assistant: Assistant, base_name: str | None) -> PromptReader:
    """Resolve tokenizers and token ids for an adapter.

    Args:
        config: The adapter's config.
        assistant: The assistant.
        base_name: Hub id or folder of the base, where its tokenizer is looked for; `None` or empty if it has none.

    Raises:
        ValueError: A tokenizer that is needed cannot be found, or a token is not one token of its vocabulary.
    """
    shares = config.assistant_shares_tokenizer
    tokenizer: PreTrainedTokenizerBase | None = None
    if shares is not True or config.thought_token is not None:
        tokenizer = _base_tokenizer(config, base_name)
    if shares is None:
        shares = config.assistant_prompt is None and (
            tokenizer is not None and tokenizer.get_vocab() == assistant.tokenizer.get_vocab()
        )
    if config.assistant_shares_tokenizer and tokenizer is not None and len(tokenizer) > assistant.vocabulary:
        raise ValueError(
            f"`assistant_shares_tokenizer` must not be True: the base's tokenizer has {len(tokenizer)} ids and the "
            f"assistant {assistant.vocabulary}. Set it to False, so that prompts are decoded and encoded again."
        )
    thought_token_id = None
    if config.thought_token is not None and tokenizer is not None:
        thought_token_id = _token_id(tokenizer, config.thought_token, "thought_token", "the base's")
    return PromptReader(
        config=config,
        assistant=assistant,
        base_tokenizer=None if shares else tokenizer,
        thought_token_id=thought_token_id,
        assistant_thought_token_id=_assistant_thought_token_id(config, assistant),
    )


def _base_tokenizer(config: SoftCoTConfig, base_name: str | None) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer from where the config, the base or the adapter says it is."""
    name = config.tokenizer_name_or_path or base_name or config.base_model_name_or_path
    remedy = (
        "Set it to the Hub id or folder of the base's tokenizer; or, if the assistant reads the same ids and no "
        "`thought_token` is set, `assistant_shares_tokenizer=True` needs none."
    )
    if not name:
        raise ValueError(f"`tokenizer_name_or_path` must be given, since the base has no `name_or_path`. {remedy}")
    revision = config.revision if name == config.base_model_name_or_path else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        if is_empty(tokenizer):
            raise OSError("There are no tokenizer files.")
        return tokenizer
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`tokenizer_name_or_path`: no tokenizer for the base can be loaded from {name!r}: {error} {remedy}"
        ) from error


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str, field: str, whose: str) -> int:
    """The id of a token that must be one token of a vocabulary."""
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        pieces = tokenizer.tokenize(token)
        raise ValueError(
            f"`{field}` must be one token of {whose} vocabulary, got {token!r}, which is {len(pieces)} tokens there "
            f"({pieces}). Choose a token that the vocabulary has, such as a reserved special token."
        )
    return int(token_id)


def _assistant_thought_token_id(config: SoftCoTConfig, assistant: Assistant) -> int:
    """What stands at the assistant's thought positions: the config's token, else unk, else eos, else pad."""
    tokenizer = assistant.tokenizer
    if config.assistant_thought_token is not None:
        return _token_id(tokenizer, config.assistant_thought_token, "assistant_thought_token", "the assistant's")
    for token_id in (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError(
        f"`assistant_thought_token` must be given, since the tokenizer of {assistant.name!r} has no unk, eos or pad "
        "token. Name any token of its vocabulary."
    )
