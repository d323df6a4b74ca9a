"""`Generation`: the state of a running `generate` call, shared by its passes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

from ..compat.caches import is_dynamic
from ..rows.arguments import PER_TOKEN_OUTPUTS, tokens
from ..rows.placement import Placement

# Per-token arguments whose distinct rows can be selected: `(B, L)` or `(B, L, H)`.
_SELECTABLE = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


@dataclass
class Generation:
    """A running `generate` call."""

    model: nn.Module  # the base
    placement: Placement  # the thought positions; the prompts end in the last column
    read: Callable[[], Tensor]  # runs the source on distinct prompts: states `(D / C, C, N, H_source)`
    length: int  # number of columns of the prompts
    first: Tensor  # the first row of each distinct prompt and chain, `(D,)`
    prompt: Tensor  # index of each row's distinct prompt and chain, `(B,)`
    consumed: int = 0  # columns processed so far; fewer than `length` during chunked prefill
    _expanded: Placement | None = None

    @cached_property
    def states(self) -> Tensor:
        """The source's states for D distinct prompts and chains, `(D, 1, N, H_source)`; read once."""
        return self.read().flatten(0, 1)[:, None]

    def placement_of(self, rows: int) -> Placement:
        """Return the placement with each row repeated for its beams or returned sequences; cached."""
        if self._expanded is None or len(self._expanded.start) != rows:
            self._expanded = self.placement.expand(rows)
        return self._expanded

    def prompts_of(self, rows: int) -> Tensor:
        """Return the distinct prompt of each of `rows` rows; beams and returned sequences of a row are adjacent."""
        return self.prompt.repeat_interleave(rows // len(self.prompt))

    def shares(self, inputs: dict[str, Any], cache: Any) -> bool:
        """Return whether prefill can run on the distinct prompts alone and copy their cache rows afterwards."""
        batch, length = tokens(inputs).shape[:2]
        return (
            len(self.first) < batch
            and length == self.length
            and is_dynamic(cache)
            and all(_is_shared(value) or _is_selectable(name, value, batch, length) for name, value in inputs.items())
            and not any(inputs.get(name) for name in PER_TOKEN_OUTPUTS)
        )

    def keep_distinct(self, inputs: dict[str, Any]) -> Placement:
        """Keep only the first row of each distinct prompt in a pass's arguments; returns their placement."""
        times = len(tokens(inputs)) // len(self.prompt)
        inputs.update({name: inputs[name][times * self.first] for name in inputs if not _is_shared(inputs[name])})
        return self.placement.select(self.first)

    @property
    def has_read(self) -> bool:
        """Whether the source has read the prompts."""
        return "states" in self.__dict__

    @property
    def prefilled(self) -> bool:
        """Whether the base has processed the whole prompts."""
        return self.consumed >= self.length


GENERATION: ContextVar[Generation | None] = ContextVar("softcot_generation", default=None)


def running_generation(model: nn.Module | None) -> Generation | None:
    """Return the running `generate` call of a base; `None` outside of `generate`."""
    generation = GENERATION.get()
    return generation if generation is not None and generation.model is model else None


def distinct_rows(
    model: PreTrainedModel, inputs: dict[str, Any], own: dict[str, Tensor | None], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Find adjacent rows with the same prompt.

    Several samples of a prompt are often requested as adjacent rows. They share its thoughts and its prefill, unless
    other arguments of the model may differ by row.

    Returns:
        The first row of each distinct prompt, `(D,)`, and the index of each row's distinct prompt, `(B,)`.
    """
    rows, ids = torch.arange(len(mask), device=mask.device), inputs.get("input_ids")
    known = {"input_ids", "attention_mask", "tokenizer", "assistant_tokenizer"}
    known |= {*inspect.signature(model.generate).parameters, *vars(model.generation_config)}  # type: ignore[arg-type]
    others = [value for name, value in {**inputs, **own}.items() if name not in known]
    if len(rows) == 1 or ids is None or not all(map(_is_shared, others)):
        return rows, rows
    both = torch.cat([ids, mask.to(ids)], 1)
    new = torch.cat([rows[:1] == 0, (both[1:] != both[:-1]).any(1)])
    return rows[new], new.cumsum(0) - 1


def _is_shared(value: Any) -> bool:
    """Return whether an argument is the same for all rows; tensors, lists and dicts may differ by row."""
    return value is None or isinstance(value, (bool, int, float, str, Cache, PretrainedConfig))


def _is_selectable(name: str, value: Any, batch: int, length: int) -> bool:
    known = name in _SELECTABLE and isinstance(value, Tensor) and value.dim() == 2 + (name == "inputs_embeds")
    return known and value.shape[:2] == (batch, length)
