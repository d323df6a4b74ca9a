"""`Generation`: what a running `generate` call knows of its prompts, for the passes within it."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

from ..compat.caches import is_dynamic
from ..rows.arguments import PER_TOKEN_OUTPUTS, tokens
from ..rows.placement import Placement

# Arguments that are picked by row where prompts are read once: `(B, L)` or `(B, L, H)`.
_PICKED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


@dataclass
class Generation:
    """A running `generate` call."""

    model: nn.Module  # the base
    placement: Placement  # where the thoughts stand in the prompts, which end in the last column
    states: Tensor  # what the thoughts of D distinct prompts are made of, `(D, K, N, H_source)`
    length: int  # columns of the prompts
    first: Tensor  # the first row of each distinct prompt, `(D,)`
    prompt: Tensor  # which distinct prompt each row has, `(B,)`
    consumed: int = 0  # columns that the base has read so far; fewer than `length` during chunked prefill
    _expanded: Placement | None = None

    def placement_of(self, rows: int) -> Placement:
        """The placement with every row repeated for its beams or returned sequences, made once."""
        if self._expanded is None or len(self._expanded.start) != rows:
            self._expanded = self.placement.expand(rows)
        return self._expanded

    def prompts_of(self, rows: int) -> Tensor:
        """Which distinct prompt each of `rows` rows has: beams and returned sequences follow their row."""
        return self.prompt.repeat_interleave(rows // len(self.prompt))

    def shares(self, inputs: dict[str, Any], cache: Any) -> bool:
        """Whether a pass over all prompts can be made for the distinct ones alone, and its cache be copied then."""
        batch, length = tokens(inputs).shape[:2]
        return (
            len(self.first) < batch
            and length == self.length
            and is_dynamic(cache)
            and all(_is_single(value) or _is_picked(name, value, batch, length) for name, value in inputs.items())
            and not any(inputs.get(name) for name in PER_TOKEN_OUTPUTS)
        )

    def keep_distinct(self, inputs: dict[str, Any]) -> Placement:
        """Keep the first row of each distinct prompt in a pass's arguments; returns where their thoughts stand."""
        times = len(tokens(inputs)) // len(self.prompt)
        inputs.update({name: inputs[name][times * self.first] for name in inputs if not _is_single(inputs[name])})
        return self.placement.select(self.first)

    @property
    def prefilled(self) -> bool:
        """Whether the base has read the prompts."""
        return self.consumed >= self.length


GENERATION: ContextVar[Generation | None] = ContextVar("softcot_generation", default=None)


def running_generation(model: nn.Module | None) -> Generation | None:
    """The running `generate` call of a base; `None` outside of one."""
    generation = GENERATION.get()
    return generation if generation is not None and generation.model is model else None


def distinct_rows(
    model: PreTrainedModel, inputs: dict[str, Any], own: dict[str, Tensor | None], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Find rows next to each other that repeat a prompt.

    Samples of one prompt are often asked for as rows next to each other. They share its thoughts and its prefill,
    unless the model is to be given anything else that may differ by row.

    Returns:
        Which rows are the first of their prompt, `(D,)`, and which of these each row repeats, `(B,)`.
    """
    rows, ids = torch.arange(len(mask), device=mask.device), inputs.get("input_ids")
    known = {"input_ids", "attention_mask", "tokenizer", "assistant_tokenizer"}
    known |= {*inspect.signature(model.generate).parameters, *vars(model.generation_config)}  # type: ignore[arg-type]
    others = [value for name, value in {**inputs, **own}.items() if name not in known]
    if len(rows) == 1 or ids is None or not all(map(_is_single, others)):
        return rows, rows
    both = torch.cat([ids, mask.to(ids)], 1)
    new = torch.cat([rows[:1] == 0, (both[1:] != both[:-1]).any(1)])
    return rows[new], new.cumsum(0) - 1


def _is_single(value: Any) -> bool:
    """Whether an argument of a forward cannot differ by row, as tensors, lists and dicts may."""
    return value is None or isinstance(value, (bool, int, float, str, Cache, PretrainedConfig))


def _is_picked(name: str, value: Any, batch: int, length: int) -> bool:
    known = name in _PICKED and isinstance(value, Tensor) and value.dim() == 2 + (name == "inputs_embeds")
    return known and value.shape[:2] == (batch, length)
