"""Drops finished sequences from the batch, so that `generate` runs only the unfinished rows."""

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

# On a GPU, each check makes the CPU wait for the GPU, and a step with fewer rows saves little.
CHECK_INTERVAL_ON_GPU = 16


class LiveRows(StoppingCriteria):
    """Drops finished sequences from the batch within one call of `generate`. The tokens stay the same.

    By default, `generate` runs every row until the longest one ends and pads the others (transformers 5.23). This
    criterion finishes a row at EOS or when one of `criteria` is met, then removes it from the KV cache and runs only
    the remaining rows. It works with greedy decoding and sampling, for any causal LM, with or without an adapter.
    Caches whose rows cannot be selected, such as static caches and linear-attention states, keep all rows.

    Beam search and assisted decoding are not supported, because they reorder rows or add several tokens at once.

    Example:
        ```python
        from softcot_peft.live_rows import LiveRows
        from transformers import StoppingCriteriaList

        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        with LiveRows(model) as live:
            criteria = StoppingCriteriaList([live])
            output = model.generate(**batch, stopping_criteria=criteria, max_new_tokens=64)
        ```

    Args:
        model: The model that generates. It needs a pad token.
        criteria: Additional stopping criteria, each returning which rows have ended, `(B,)`.

    Raises:
        TypeError: `model` is neither a transformers model nor a PEFT model around one.
        ValueError: During generation, if rows do not grow by one token per step, as with draft models or when the
            criterion is reused in a second `generate` call.
    """

    eos_token_id = None  # makes `generate` pad finished rows (transformers 5.23)

    def __init__(self, model: PreTrainedModel | PeftModel, criteria: Sequence[StoppingCriteria] = ()) -> None:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(base, PreTrainedModel):
            raise TypeError(
                f"`model` must be a transformers model or a PEFT model around one, got {type(model).__name__}. Pass "
                "the model whose `generate` you call."
            )
        self._model: Any = base
        eos = self._model.generation_config.eos_token_id
        self._criteria = StoppingCriteriaList([*([] if eos is None else [EosTokenCriteria(eos)]), *criteria])
        self._ended: Tensor | None = None  # (B,)
        self._rows: Tensor | None = None  # indices of the batch rows in the cache; `None`: all
        self._length: int | None = None  # row length at the last call
        self._steps = 0

    def __enter__(self) -> LiveRows:
        """Wrap the model's `forward`; its hooks stay outside of the wrapper."""
        self._instance_forward = self._model.__dict__.get("forward")
        self._forward = self._model.forward
        self._model.forward = functools.update_wrapper(functools.partial(self._run), self._forward)
        return self

    def __exit__(self, *raised: object) -> None:
        """Restore the model's `forward`."""
        del self._model.forward
        if self._instance_forward is not None:
            self._model.forward = self._instance_forward

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which rows have ended, `(B,)`. `generate` calls this after each token.

        Args:
            input_ids: Prompts with the tokens generated so far, `(B, L)`.
            scores: As passed by `generate`.
            **kwargs: As passed by `generate`.
        """
        length = input_ids.shape[1]
        if self._length is not None and length != self._length + 1:
            raise ValueError(
                f"`LiveRows` must see rows grow by one token at a time, but they went from {self._length} to "
                f"{length}. Make one for each call of `generate`, without drafts."
            )
        ended: Tensor = self._criteria(input_ids, scores, **kwargs)
        self._length, self._ended = length, ended if self._ended is None else self._ended | ended
        return self._ended

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's `forward` on the unfinished rows; the logits of the other rows are zeros."""
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        if self._ended is None or cache is None or not _has_selectable_rows(cache):
            return self._forward(*args, **kwargs)
        batch_size = len(self._ended)
        by_row = _arguments_by_row(kwargs, batch_size)
        if by_row is None:
            return self._forward(*args, **kwargs)
        if self._steps % self._check_interval == 0:
            self._drop_ended(self._ended, cache)
        self._steps += 1
        if self._rows is None:
            return self._forward(*args, **kwargs)
        output = self._forward(*args, **kwargs | {name: value[self._rows] for name, value in by_row.items()})
        logits = output.logits.new_zeros(batch_size, *output.logits.shape[1:])
        output.logits = logits.index_copy_(0, self._rows, output.logits)
        return output

    @property
    def _check_interval(self) -> int:
        """Number of steps between checks for finished rows."""
        return 1 if self._ended is None or self._ended.device.type == "cpu" else CHECK_INTERVAL_ON_GPU

    def _drop_ended(self, ended: Tensor, cache: Cache) -> None:
        """Remove finished rows from the cache; if all are finished, keep the cache as it is."""
        held = torch.arange(len(ended), device=ended.device) if self._rows is None else self._rows
        live = (~ended[held]).nonzero()[:, 0]  # indices into the cache's rows
        if 0 < len(live) < len(held):
            cache.batch_select_indices(live)
            self._rows = held[live]


def _has_selectable_rows(cache: Cache) -> bool:
    """Return whether a cache holds only keys and values, whose rows can be selected."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)


def _arguments_by_row(kwargs: dict[str, Any], batch_size: int) -> dict[str, Tensor] | None:
    """Return the arguments with one row per sequence; `None` if the batch dimension of another one is unclear."""
    found = {}
    for name, value in kwargs.items():
        if isinstance(value, dict) or (isinstance(value, Tensor) and value.dim() > (3 if "embeds" in name else 2)):
            return None
        if isinstance(value, Tensor) and value.dim() > 1 and len(value) == batch_size:
            found[name] = value
    return found
