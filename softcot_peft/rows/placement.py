"""Where the thoughts of a batch stand, and what follows from it for masks and positions. Pure tensor functions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .columns import take


@dataclass(frozen=True)
class Placement:
    """Where the thoughts of a batch stand."""

    start: Tensor  # column of the first thought, per row, `(B,)` int64. The same number in both coordinate systems
    num_thoughts: int  # N
    # Whether the thought positions are added to the caller's columns (automatic placement) or are already among them
    # (a run of thought tokens).
    inserted: bool
    attention_mask: Tensor | None  # the caller's mask `(B, L)`, or `None` where every token is attended
    padded: bool  # whether any token is not attended
    latest: int  # the largest `start`, on the host
    earliest: int  # the smallest, on the host
    reach: int = 0  # the most columns from a row's `start` to behind its last attended or labelled token, on the host
    late: bool = False  # whether labels stand before the thoughts, which no loss may count

    @property
    def column(self) -> int | None:
        """`start` as a number, where it is the same in every row; slices do there what takes an index else."""
        return self.latest if self.latest == self.earliest else None

    @property
    def num_inserted(self) -> int:
        """How many columns the base sees beyond the caller's: N or 0."""
        return self.num_thoughts if self.inserted else 0

    def after(self, seen: int) -> Placement:
        """The same place, counted from column `seen` on."""
        if seen == 0:
            return self
        earliest, latest = self.earliest - seen, self.latest - seen
        return replace(self, start=self.start - seen, earliest=earliest, latest=latest)

    def expand(self, rows: int) -> Placement:
        """Repeat every row for its beams or returned sequences, which stand next to each other."""
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
        """Pick rows, `(B',)` int64, with repetition if wanted."""
        mask, rows = self.attention_mask, rows.to(self.start.device)
        return replace(self, start=self.start[rows], attention_mask=None if mask is None else mask[rows])


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids that count attended tokens, as transformers' `generate` makes them: `(B, L)` to `(B, L)`.

    Padding has the position of the token before it, so that thoughts inserted behind it count on from there.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def trailing(attention_mask: Tensor) -> Tensor:
    """How many columns follow the last attended one, per row: `(B, L)` to `(B,)`."""
    return attention_mask.flip(1).ne(0).int().argmax(1)


def align_left(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Roll every row so that its last attended token comes last, as left padding has it."""
    length = values.shape[1]
    columns = torch.arange(length, device=values.device)
    return take(values, (columns - trailing(attention_mask).to(values.device)[:, None]) % length)


def prompts(input_ids: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
    """What the assistant may see: the attended tokens before the thoughts.

    Args:
        input_ids: `(B, L)`.
        placement: Where the thoughts stand.

    Returns:
        Ids `(B, P)` and mask `(B, P)` with the prompts' ends in the last column; P is the longest prompt's span.
    """
    start = placement.start.to(input_ids.device)
    columns = torch.arange(-placement.latest, 0, device=input_ids.device) + start[:, None]  # (B, P)
    mask = columns >= 0
    columns = columns.clamp(min=0)
    if placement.attention_mask is not None:
        mask = mask & take(placement.attention_mask, columns).to(mask.device).bool()
    return take(input_ids, columns), mask.long()
