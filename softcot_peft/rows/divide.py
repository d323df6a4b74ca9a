"""Splits the rows of a training step into prompts and responses with thoughts, as pure tensor functions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .columns import insert, take
from .facts import IGNORED
from .placement import Placement, positions, prompts


@dataclass(frozen=True)
class DividedRows:
    """The rows of a batch, each split in two."""

    prompt: dict[str, Tensor]  # arguments of the prompt pass, over `(B, P)` tokens
    # Arguments of the response pass, over `(B, W)` placed columns: all thoughts and everything after them.
    response: dict[str, Tensor]
    labels: Tensor  # `(B, W)`
    cut: Tensor  # the placed column at which each row is split, `(B,)`; at its thoughts or before
    placement: Placement  # the thought positions in the caller's columns
    length: int  # L, the number of the caller's columns
    predicts: Tensor  # indices into the `(B * W)` columns of the response pass that predict a label, `(T,)`
    targets: Tensor  # those labels, `(T,)`

    @property
    def shape(self) -> torch.Size:
        """`(B, W)`."""
        return self.labels.shape

    @property
    def skipped(self) -> int:
        """Number of leading columns of the response pass that predict no label: all inserted thoughts but the last."""
        return self.placement.num_thoughts - 1 if self.placement.inserted else 0

    def columns_of(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the response pass's column for each of the caller's first columns, and whether it has one.

        Returns:
            Columns (int64) and a mask (bool), both `(B, length)`.
        """
        start, num = self.placement.start[:, None], self.placement.num_inserted
        columns = torch.arange(length, device=start.device)
        # The last inserted thought takes the place of the last prompt token.
        included = columns >= start - int(num > 0)
        return columns + num * included - self.cut[:, None], included

    def repeated(self, times: int) -> DividedRows:
        """Repeat each row of the response pass for its chains, which are adjacent."""
        labels = self.labels.repeat_interleave(times, dim=0)
        predicts, targets = predicted(labels)
        return replace(
            self,
            response={name: value.repeat_interleave(times, dim=0) for name, value in self.response.items()},
            labels=labels,
            cut=self.cut.repeat_interleave(times),
            placement=self.placement.expand(len(labels)),
            predicts=predicts,
            targets=targets,
        )

    def align(self, values: Tensor, length: int) -> Tensor:
        """Align values of the response pass, `(B, W, ...)`, with the caller's columns, `(B, length, ...)`; else 0."""
        index, included = self.columns_of(length)
        taken = take(values, index.clamp(0, values.shape[1] - 1))
        missing = ~included | (index >= values.shape[1])
        return taken.masked_fill(missing.to(taken.device).view(*missing.shape, *[1] * (values.dim() - 2)), 0)


def cuts_by_row(placement: Placement, length: int) -> bool:
    """Return whether splitting each row at its own thoughts is cheaper than splitting all rows at the earliest ones.

    A column with gradient counts as four: it runs forward and backward, usually has logits, and keeps its activations.
    """
    return placement.latest + 4 * placement.max_span <= placement.earliest + 4 * (length - placement.earliest)


def divide(
    inputs: dict[str, Any], placement: Placement, filler: int, takes_positions: bool, by_row: bool = False
) -> DividedRows:
    """Split a batch at its thoughts: each row at its own, or all rows at the earliest ones, whichever is cheaper.

    Rows that are split at their own thoughts are shifted so that the splits align: prompts are padded on the left,
    responses on the right.

    Args:
        inputs: `input_ids` and `labels` of the step, `(B, L)`.
        placement: The thought positions.
        filler: Id at inserted thought positions.
        takes_positions: Whether padded rows need explicit position ids.
        by_row: Whether each row is split at its own thoughts in any case.
    """
    ids, labels, mask = inputs["input_ids"], inputs["labels"], placement.attention_mask
    start, earliest, num = placement.start, placement.earliest, placement.num_inserted
    length = ids.shape[1]
    here, width = placement, placement.max_span + num
    if not (by_row or cuts_by_row(placement, length)):
        here = replace(placement, start=torch.full_like(start, earliest), latest=earliest)
        width = length - earliest + num
    prompt_ids, prompt_mask = prompts(ids, here)
    attended = torch.ones_like(ids) if mask is None else mask.to(ids.device)
    placed = [
        insert(values, start, num, fill, placement.column) if num else values
        for values, fill in ((ids, filler), (labels, IGNORED), (attended, 1))
    ]
    columns = torch.arange(width, device=ids.device) + here.start[:, None]  # (B, W)
    beyond = columns >= length + num
    rest_ids, rest_labels, rest_mask = (take(values, columns.clamp(max=length + num - 1)) for values in placed)
    prompt, response = {"input_ids": prompt_ids}, {"input_ids": rest_ids}
    if placement.padded or placement.column is None:
        seen = torch.cat([prompt_mask, rest_mask.masked_fill(beyond, 0).to(prompt_mask)], 1)
        prompt["attention_mask"], response["attention_mask"] = prompt_mask, seen
        if takes_positions:
            where = positions(seen)
            prompt["position_ids"], response["position_ids"] = where.tensor_split([prompt_ids.shape[1]], 1)
    rest_labels = rest_labels.masked_fill(beyond, IGNORED)
    predicts, targets = predicted(rest_labels)  # synchronizes: here, while an accelerator has little work queued
    return DividedRows(prompt, response, rest_labels, here.start, placement, length, predicts, targets)


def predicted(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the `(B * L)` columns predict a label, `(T,)`, and those labels, `(T,)`, for labels `(B, L)`."""
    targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    predicts = (targets != IGNORED).nonzero()[:, 0]
    return predicts, targets[predicts]
