"""`Placement`: the thought positions of a batch, and masks and position ids that depend on them. No models."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .columns import take


@dataclass(frozen=True)
class Placement:
    """The thought positions of a batch."""

    start: Tensor  # column of each row's first thought, `(B,)` int64; the same in both coordinate systems
    num_thoughts: int  # N
    # Whether thought positions are inserted into the caller's columns (automatic placement) or already among them (a
    # run of thought tokens).
    inserted: bool
    attention_mask: Tensor | None  # the caller's mask `(B, L)`; `None` if every token is attended
    padded: bool  # whether any token is masked
    latest: int  # largest `start`, on the host
    earliest: int  # smallest `start`, on the host
    max_span: int = 0  # largest distance from `start` to the end of the last attended or labelled token, on the host
    has_early_labels: bool = False  # whether there are labels before the thoughts, which the loss must ignore
    # Number of columns from `start` to the end of the last attended token, on the host; `None` if it differs by row.
    tail: int | None = None

    @property
    def column(self) -> int | None:
        """`start` as a number, if it is the same for all rows, so that slicing can replace indexing; else `None`."""
        return self.latest if self.latest == self.earliest else None

    @property
    def num_inserted(self) -> int:
        """Number of columns inserted into the caller's: N or 0."""
        return self.num_thoughts if self.inserted else 0

    def after(self, seen: int) -> Placement:
        """Return the same placement with columns counted from `seen`."""
        if seen == 0:
            return self
        earliest, latest = self.earliest - seen, self.latest - seen
        return replace(self, start=self.start - seen, earliest=earliest, latest=latest)

    @property
    def before(self) -> Tensor:
        """Column of the last attended token before the thoughts of each row, `(B,)`; a mask may have holes."""
        mask = self.attention_mask
        if mask is None or not self.padded:
            return self.start - 1
        columns = torch.arange(mask.shape[1], device=mask.device)
        earlier = (mask != 0) & (columns < self.start.to(mask.device)[:, None])
        return torch.where(earlier, columns, -1).amax(1)

    def expand(self, rows: int) -> Placement:
        """Repeat each row for its beams or returned sequences, which are adjacent."""
        times = rows // self.start.shape[0]
        if times == 1:
            return self
        mask = self.attention_mask
        return replace(
            self,
            start=self.start.repeat_interleave(times),
            attention_mask=None if mask is None else mask.repeat_interleave(times, dim=0),
        )

    def select(self, rows: Tensor) -> Placement:
        """Select rows by index, `(B',)` int64; indices may repeat."""
        mask, rows = self.attention_mask, rows.to(self.start.device)
        return replace(self, start=self.start[rows], attention_mask=None if mask is None else mask[rows])


def positions(attention_mask: Tensor) -> Tensor:
    """Compute position ids that count attended tokens, as in transformers' `generate`: `(B, L)` to `(B, L)`.

    Padding has the position of the token before it, so that thoughts inserted after padding continue from there.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def trailing(attention_mask: Tensor) -> Tensor:
    """Count the columns after the last attended one in each row: `(B, L)` to `(B,)`."""
    return attention_mask.flip(1).ne(0).int().argmax(1)


def align_left(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Roll each row so that its last attended token is in the last column, as with left padding."""
    length = values.shape[1]
    columns = torch.arange(length, device=values.device)
    return take(values, (columns - trailing(attention_mask).to(values.device)[:, None]) % length)


def prompts(input_ids: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
    """Extract the prompts, which the source may read: the attended tokens before the thoughts.

    Args:
        input_ids: `(B, L)`.
        placement: The thought positions.

    Returns:
        Ids and mask, both `(B, P)`, with the ends of the prompts in the last column; P is the longest prompt's span.
    """
    start = placement.start.to(input_ids.device)
    columns = torch.arange(-placement.latest, 0, device=input_ids.device) + start[:, None]  # (B, P)
    mask = columns >= 0
    columns = columns.clamp(min=0)
    if placement.attention_mask is not None:
        mask = mask & take(placement.attention_mask, columns).to(mask.device).bool()
    return take(input_ids, columns), mask.long()
