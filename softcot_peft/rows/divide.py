"""Divides the rows of a training step into prompts, and thoughts with responses. Pure tensor functions."""

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
    """The rows of a batch, each cut in two."""

    prompt: dict[str, Tensor]  # arguments of the prompt pass, over `(B, P)` tokens
    # Arguments of the response pass, over `(B, W)` placed columns: all thoughts, and what stands behind them.
    response: dict[str, Tensor]
    labels: Tensor  # `(B, W)`
    cut: Tensor  # the placed column in which each row's response pass begins, `(B,)`; at its thoughts or before
    placement: Placement  # where the thoughts stand in the caller's columns
    length: int  # the caller's columns L
    predicts: Tensor  # which columns of the response pass, as `(B * W)`, predict a label, `(T,)`
    targets: Tensor  # these labels, `(T,)`

    @property
    def shape(self) -> torch.Size:
        """`(B, W)`."""
        return self.labels.shape

    @property
    def skipped(self) -> int:
        """First columns of the response pass that predict no label: those before the last of inserted thoughts."""
        return self.placement.num_thoughts - 1 if self.placement.inserted else 0

    def index_of(self, length: int) -> tuple[Tensor, Tensor]:
        """Where the response pass has the rows of the caller's first columns, and whether it has them.

        Returns:
            Both `(B, length)`, int64 and bool.
        """
        start, num = self.placement.start[:, None], self.placement.num_inserted
        columns = torch.arange(length, device=start.device)
        late = columns >= start - int(num > 0)  # of inserted thoughts, the last one's row is the last prompt token's
        return columns + num * late - self.cut[:, None], late

    def in_line(self, values: Tensor, length: int) -> Tensor:
        """Values of the response pass `(B, W, ...)` in the caller's columns `(B, length, ...)`; 0 before thoughts."""
        index, late = self.index_of(length)
        found = take(values, index.clamp(0, values.shape[1] - 1))
        none = ~late | (index >= values.shape[1])
        return found.masked_fill(none.to(found.device).view(*none.shape, *[1] * (values.dim() - 2)), 0)


def cuts_by_row(placement: Placement, length: int) -> bool:
    """Whether rows of L columns are cut at their own thoughts, rather than all at the earliest: the cheaper way.

    A column with gradient counts for four: it goes forward and back, usually has logits, and is kept in between.
    """
    return placement.latest + 4 * placement.reach <= placement.earliest + 4 * (length - placement.earliest)


def divide(inputs: dict[str, Any], placement: Placement, filler: int, takes_positions: bool) -> DividedRows:
    """Divide a batch where its thoughts begin: each row at its own, or all at the earliest, whichever is cheaper.

    Rows that are cut at their own thoughts are moved, so that the cuts stand under each other: prompts are padded on
    the left, responses on the right.

    Args:
        inputs: `input_ids` and `labels` `(B, L)` of the step.
        placement: Where its thoughts stand.
        filler: Id at inserted thought positions.
        takes_positions: Whether the base wants to be told the positions of padded rows.
    """
    ids, labels, mask = inputs["input_ids"], inputs["labels"], placement.attention_mask
    start, earliest, num = placement.start, placement.earliest, placement.num_inserted
    length = ids.shape[1]
    here, width = placement, placement.reach + num
    if not cuts_by_row(placement, length):
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
    predicts, targets = predicted(rest_labels)  # here, where an accelerator has little left to do
    return DividedRows(prompt, response, rest_labels, here.start, placement, length, predicts, targets)


def predicted(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which columns `(B * L)` predict a label, `(T,)`, and these labels, `(T,)`, of labels `(B, L)`."""
    targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    predicts = (targets != IGNORED).nonzero()[:, 0]
    return predicts, targets[predicts]
