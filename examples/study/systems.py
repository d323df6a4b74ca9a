"""The compared systems of `baselines/` on real models: bfloat16 bases, chat prompts, batches of like length.

All read the same rendered prompt. Prompt tuning puts its vectors before it; placeholders, CoT-Unk and SoftCoT put
theirs at its end; Assist-CoT writes its hint at the end of the user turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from baselines import AssistCoT, Baseline, CotUnk, Lora, PromptTuning, SoftCoT, TrainedPlaceholders, ZeroShot
from baselines.cot_unk import Placeholders
from precision import avoid_cudnn_attention
from torch import Tensor
from train_gsm8k import ASSISTANT_PREFIX, ASSISTANT_PROMPT, DELIMITERS
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from softcot_peft import use_assistant
from softcot_peft.live_rows import LiveRows

from . import stretches as stretches  # registers its source
from .jobs import Training
from .tasks import between, rendered

HINT_REQUEST = (
    "Someone else has to answer the question below. Help with a hint of one or two sentences: say what is asked and "
    "which steps lead there, but do not answer it.\n\n{question}"
)
HINT_TOKENS = 64
HINT = "\n\nA hint from a smaller model, which may be wrong: {hint}"
MIDDLE = "softcot-study"  # stands for the text when the end of a rendered prompt is looked for


@dataclass(frozen=True)
class Models:
    """Folders or Hub ids of a pair's models, and how they run."""

    base: str
    assistant: str
    dtype: str = "bfloat16"
    max_new_tokens: int = 320
    batch: int = 16


def batches(order: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    """Split into the fewest batches of at most `size`, all of nearly the same size, so that none has a single row."""
    count = -(-len(order) // size)
    bounds = [len(order) * i // count for i in range(count + 1)]
    return [order[first:last] for first, last in pairwise(bounds)]


def ids_of(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Return the ids of rendered prompts; a chat template has written the special tokens."""
    special = tokenizer.chat_template is None
    return [list(ids) for ids in tokenizer(list(prompts), add_special_tokens=special)["input_ids"]]


def unused_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a special token that no prompt contains: placeholder of CoT-Unk, and mark of the thoughts' place.

    Raises:
        ValueError: There is none.
    """
    prompt = rendered(tokenizer, MIDDLE)
    used = {tokenizer.eos_token_id, *ids_of(tokenizer, [prompt])[0]}
    added = map(str, tokenizer.added_tokens_decoder.values())
    for token in (tokenizer.unk_token, tokenizer.pad_token, *tokenizer.all_special_tokens, *added):
        if token is not None and tokenizer.convert_tokens_to_ids(token) not in used:
            return str(token)
    raise ValueError(
        f"`base` must have a special token that its prompts do not use, {tokenizer.name_or_path} has none."
    )


def states_in_order(head: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Copy the states that a head multiplies; a hook before it.

    Of `logits_to_keep`, they are a slice. With a frozen head, PyTorch multiplies it row by row, and on CPUs copies the
    head for each row, which takes as long as the rest of a training step.
    """
    return (args[0].clone(memory_format=torch.contiguous_format),)


class Real(Baseline):
    """Replaces [`Baseline`]'s loading and generation; the last base of each class below.

    Args:
        base: The models.
        **settings: Arguments of [`Baseline`].
    """

    def __init__(self, base: Models, **settings: Any) -> None:
        self.models = base
        super().__init__(base.base, **(settings | {"max_new_tokens": base.max_new_tokens}))
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def load_base(self) -> PreTrainedModel:
        """Load the base, frozen, with greedy decoding instead of its own settings."""
        avoid_cudnn_attention()
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=getattr(torch, self.models.dtype))
        own, tokenizer = base.generation_config.eos_token_id, self.tokenizer
        ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        base.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=pad, do_sample=False)
        self.ends = sorted(ends)
        base.get_output_embeddings().register_forward_pre_hook(states_in_order)
        return base.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the ids of rendered prompts."""
        return ids_of(self.tokenizer, prompts)

    @torch.no_grad()
    def answer(self, prompts: Sequence[str], **generation: Any) -> list[str]:
        """As [`Baseline.answer`], in batches of like length; finished sequences are dropped from their batch."""
        rows = self.prompt_ids(prompts)
        settings = {"max_new_tokens": self.max_new_tokens, "do_sample": False, **generation}
        copies = settings.get("num_return_sequences", 1)
        order = sorted(range(len(rows)), key=lambda place: (len(rows[place]), place))
        texts: dict[int, list[str]] = {}
        for batch in batches(order, max(2, self.models.batch // copies)):
            ids, mask = (each.to(self.model.device) for each in self.left_padded([rows[place] for place in batch]))
            with LiveRows(self.model) as live:
                new = self.generate(ids, mask, stopping_criteria=StoppingCriteriaList([live]), **settings)
            self.generated_tokens += self.count(new)
            written = self.tokenizer.batch_decode(new, skip_special_tokens=True)
            texts |= {place: written[i * copies : (i + 1) * copies] for i, place in enumerate(batch)}
        return [text for place in range(len(rows)) for text in texts[place]]

    def count(self, new: Tensor) -> int:
        """Count the generated tokens, with each row's first end token and without its padding."""
        ended = torch.isin(new, torch.tensor(self.ends, device=new.device)).long()
        return int((ended.cumsum(1) - ended == 0).sum())


class RealZeroShot(ZeroShot, Real):
    """The base alone."""


class RealCotUnk(CotUnk, Real):
    """The base with N unused special tokens at the end of its prompt."""


class RealAssistCoT(AssistCoT, Real):
    """The base reads a written hint of the assistant at the end of the user turn."""

    def __init__(self, base: Models) -> None:
        super().__init__(base, base.assistant)
        self.assistant = RealZeroShot(replace(base, base=base.assistant, max_new_tokens=HINT_TOKENS))

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the ids of the prompts with their hints."""
        end = rendered(self.tokenizer, MIDDLE).rpartition(MIDDLE)[2]
        hints = [HINT.format(hint=hint.strip()) for hint in self.hints(prompts)]
        texts = [prompt.removesuffix(end) + hint + end for prompt, hint in zip(prompts, hints, strict=True)]
        return ids_of(self.tokenizer, texts)

    def hints(self, prompts: Sequence[str]) -> list[str]:
        """Return the assistant's hints for the questions of the prompts. Their tokens count as the system's."""
        questions = [HINT_REQUEST.format(question=between(prompt)) for prompt in prompts]
        return super().hints([rendered(self.assistant.tokenizer, question) for question in questions])


class RealLora(Lora, Real):
    """LoRA of rank 4 in all linear layers, in float32."""


class RealPromptTuning(PromptTuning, Real):
    """Prompt tuning, with vectors in float32."""

    def generate(self, ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        """As [`PromptTuning.generate`], in the base's dtype."""
        base = self.model.get_base_model()
        embeddings = base.get_input_embeddings()(ids)
        vectors = self.model.get_prompt(batch_size=len(ids)).to(embeddings.dtype)  # (B, N, H)
        whole = torch.cat([mask.new_ones(vectors.shape[:2]), mask], 1)
        return base.generate(inputs_embeds=torch.cat([vectors, embeddings], 1), attention_mask=whole, **settings)


class FullPlaceholders(Placeholders):
    """Trained placeholders in float32, read in the base's dtype."""

    def __init__(self, embedding: torch.nn.Module, number: int) -> None:
        super().__init__(embedding, number)
        self.vectors.data = self.vectors.data.float()

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids `(B, L)` to embeddings `(B, L, H)`."""
        return super().forward(ids).to(self.embedding.weight.dtype)


class RealPlaceholders(TrainedPlaceholders, Real):
    """Trained placeholders at SoftCoT's thought positions."""

    def attach(self, base: PreTrainedModel) -> PreTrainedModel:
        """Return the base with N more ids that can be read but not generated."""
        base.set_input_embeddings(FullPlaceholders(base.get_input_embeddings(), self.num_placeholders))
        return base

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the ids of the prompts with the placeholders at their ends."""
        first = len(self.model.get_input_embeddings().embedding.weight)
        added = list(range(first, first + self.num_placeholders))
        return [[*ids, *added] for ids in ids_of(self.tokenizer, prompts)]


class RealSoftCoT(SoftCoT, Real):
    """SoftCoT with thoughts at the end of the prompt."""


def shallow_assistant(name: str, depth: float, dtype: str) -> str:
    """Register an assistant whose last layers are left out, and return its name."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    decoder = model.get_decoder()
    kept = max(1, round(depth * len(decoder.layers)))
    decoder.layers = decoder.layers[:kept]
    for config in {id(each): each for each in (model.config, decoder.config)}.values():
        with suppress(AttributeError):
            config.layer_types = config.layer_types[:kept]
        config.num_hidden_layers = kept
    return use_assistant(model, AutoTokenizer.from_pretrained(name), name=f"{name} to layer {kept}")


def softcot(models: Models, training: Training, marked: bool = False) -> RealSoftCoT:
    """Create SoftCoT with a new projection.

    Args:
        models: The models.
        training: Fields of the config.
        marked: Whether prompts may hold a run of `unused_token` at the thoughts' place.
    """
    fields: dict[str, Any] = {"projection": training.projection, "projection_init": training.projection_init}
    reader: str | None = models.assistant
    if training.thought_source == "base":
        reader, fields["thought_source"] = None, "base"
    else:
        fields |= {"thought_source": training.thought_source, "chain_init": training.chain_init}
        fields |= {"assistant_dtype": models.dtype, "assistant_prompt_between": list(DELIMITERS)}
        if training.thought_source == "assistant":  # other sources read the question without a request
            fields["assistant_prompt"] = ASSISTANT_PROMPT
            fields["assistant_prefix"] = ASSISTANT_PREFIX if training.lead_in else None
        if training.depth < 1:
            reader = shallow_assistant(models.assistant, training.depth, models.dtype)
    if marked:
        fields["thought_token"] = unused_token(AutoTokenizer.from_pretrained(models.base))
    return RealSoftCoT(models, reader, training.thoughts, fields)
