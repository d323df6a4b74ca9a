"""Answers differ in length: within `generate`, run only those rows of a batch that have not ended."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    EosTokenCriteria,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Asking a GPU which rows have ended waits for it, and its steps take much the same time with fewer rows.
STEPS_ON_GPU = 16


class LiveRows(StoppingCriteria):
    """Ends rows where the model's EOS or other criteria say so, and has the model run the others alone from then on.

        with LiveRows(model) as live:
            model.generate(**batch, stopping_criteria=StoppingCriteriaList([live]))

    What is generated stays the same, greedy or sampled: `generate` writes padding after a row's end, for which it
    needs a pad token, and runs all rows to the end of the longest (transformers 5.23). Here, rows that have ended
    leave the cache; what is left of it is copied, as each step does anyhow. Caches whose rows cannot be picked, such
    as static ones and states of linear attention, keep all rows.

    For one call of `generate`, without beams, which change places, and without drafts.

    Args:
        model: What generates; of PEFT's wrapper, the base is led.
        criteria: Each tells of each row whether it has ended, `(B,)`.

    Raises:
        ValueError: Rows do not grow by one token at a time, as in drafts or in a second call of `generate`.
    """

    eos_token_id = None  # `generate` writes padding after a row's end where a criterion has this attribute (5.23)

    def __init__(self, model: PreTrainedModel | PeftModel, criteria: Sequence[StoppingCriteria] = ()) -> None:
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        eos = self.model.generation_config.eos_token_id
        self.criteria = StoppingCriteriaList([*([] if eos is None else [EosTokenCriteria(eos)]), *criteria])
        self.ended: Tensor | None = None  # (B,)
        self.rows: Tensor | None = None  # of the batch, those that the cache holds; `None`: all
        self.length: int | None = None  # of the rows when they were last asked for
        self.steps = 0

    def __enter__(self) -> LiveRows:
        """Stand before the model's forward, inside of what hooks do around it."""
        self.earlier = self.model.__dict__.get("forward")
        self.forward = self.model.forward
        self.model.forward = functools.update_wrapper(functools.partial(self.run), self.forward)
        return self

    def __exit__(self, *raised: object) -> None:
        """Give the model its forward back."""
        del self.model.forward
        if self.earlier is not None:
            self.model.forward = self.earlier

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows have ended, `(B,)`; `generate` asks after each token."""
        length = input_ids.shape[1]
        if self.length is not None and length != self.length + 1:
            raise ValueError(
                f"`LiveRows` must see rows grow by one token at a time, but they went from {self.length} to {length}. "
                "Make one for each call of `generate`, without drafts."
            )
        self.length, ended = length, self.criteria(input_ids, scores, **kwargs)
        self.ended = ended if self.ended is None else self.ended | ended
        return self.ended

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward on the rows that go on; logits of the others are zeros."""
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        if self.ended is None or not _picks_rows(cache):
            return self.forward(*args, **kwargs)
        number = len(self.ended)
        by_row = _by_row(kwargs, number)
        if by_row is None:
            return self.forward(*args, **kwargs)
        if self.steps % self.every == 0:
            self._leave_out(cache)
        self.steps += 1
        if self.rows is None:
            return self.forward(*args, **kwargs)
        output = self.forward(*args, **kwargs | {name: value[self.rows] for name, value in by_row.items()})
        logits = output.logits.new_zeros(number, *output.logits.shape[1:])
        output.logits = logits.index_copy_(0, self.rows, output.logits)
        return output

    @property
    def every(self) -> int:
        """Steps between two looks at which rows have ended."""
        return 1 if self.ended.device.type == "cpu" else STEPS_ON_GPU

    def _leave_out(self, cache: Cache) -> None:
        """Take the rows that have ended out of the cache, but for the last ones where all have."""
        held = torch.arange(len(self.ended), device=self.ended.device) if self.rows is None else self.rows
        going = (~self.ended[held]).nonzero()[:, 0]  # places in the cache
        if 0 < len(going) < len(held):
            cache.batch_select_indices(going)
            self.rows = held[going]


def _picks_rows(cache: Cache | None) -> bool:
    """Whether a cache holds keys and values alone, so that picking their rows is all there is to do."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)


def _by_row(inputs: dict[str, Any], number: int) -> dict[str, Tensor] | None:
    """The arguments with a row for each of the batch; `None` where others may have their rows somewhere else."""
    found = {}
    for name, value in inputs.items():
        if isinstance(value, dict) or (isinstance(value, Tensor) and value.dim() > (3 if "embeds" in name else 2)):
            return None
        if isinstance(value, Tensor) and value.dim() > 1 and len(value) == number:
            found[name] = value
    return found
