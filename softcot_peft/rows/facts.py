"""Computes the properties of a batch that determine its thought positions, without synchronizing with the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

IGNORED = -100  # the label that losses of transformers ignore


@dataclass(frozen=True)
class Facts:
    """Properties of the rows of a batch, per row `(B,)` or per token `(B, L)`."""

    attended: Tensor  # (B, L) bool
    labelled: Tensor  # (B, L) bool
    counts: Tensor  # (B,) number of attended thought tokens without a label
    run_start: Tensor  # (B,) column of the first one; L if there is none
    run_end: Tensor  # (B,) column after the last one; 0 if there is none
    last_label: Tensor  # (B,) column of the last label; -1 if there is none
    label_runs: Tensor  # (B, L) bool: first column of each run of labels after the thoughts
    uses_run: Tensor  # () bool: whether any row has a thought token
    start: Tensor  # (B,) column of the first thought
    end: Tensor  # (B,) column after the last attended or labelled token
    attended_end: Tensor  # (B,) column after the last attended token
    marked: bool  # whether `start` was found by a marker, if no row has a thought token

    @property
    def before(self) -> Tensor:
        """Columns before the thoughts of each row, `(B, L)` bool."""
        return torch.arange(self.attended.shape[1], device=self.start.device) < self.start[:, None]

    @property
    def prompt(self) -> Tensor:
        """Tokens that a source may read, `(B, L)` bool."""
        return self.attended & self.before


def read_facts(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    thought_token_id: int | None,
    starts: Tensor | None = None,
) -> Facts:
    """Compute the facts from ids, mask and labels, each `(B, L)` or `None`.

    A run of unlabelled thought tokens marks the thought positions; a labelled thought token is text. Without a run,
    thoughts are placed at `starts`, `(B,)`; if it is `None`, before the first label, or after the last attended token
    in rows without labels.
    """
    reference = next(tensor for tensor in (input_ids, attention_mask, labels) if tensor is not None)
    length = reference.shape[1]
    columns = torch.arange(length, device=reference.device)

    def first(where: Tensor) -> Tensor:
        return torch.where(where, columns, length).amin(1)

    def last(where: Tensor) -> Tensor:
        return torch.where(where, columns, -1).amax(1)

    attended = torch.ones_like(reference, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    labelled = torch.zeros_like(attended) if labels is None else labels != IGNORED
    is_thought = torch.zeros_like(attended)
    if input_ids is not None and thought_token_id is not None:
        is_thought = (input_ids == thought_token_id) & attended & ~labelled
    counts = is_thought.sum(1)
    uses_run, run_start = counts.amax() > 0, first(is_thought)
    attended_end = last(attended) + 1
    prompt_end = torch.where(labelled.any(1), first(labelled), attended_end) if starts is None else starts
    start = torch.where(uses_run, run_start, prompt_end)
    counted = labelled & (columns >= start[:, None])
    return Facts(
        attended=attended,
        labelled=labelled,
        counts=counts,
        run_start=run_start,
        run_end=last(is_thought) + 1,
        last_label=last(labelled),
        label_runs=counted & ~nn.functional.pad(counted, (1, -1)),
        uses_run=uses_run,
        start=start,
        end=last(attended | labelled) + 1,
        attended_end=attended_end,
        marked=starts is not None,
    )
