"""The pass over whole rows, with prompts and responses, outside of `generate`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..compat.caches import find_cache
from ..rows.arguments import drop_early_labels, pop_own, tokens
from ..rows.checks import check_arguments
from ..rows.placement import Placement
from .cache_record import check_room, remember
from .interface import InsertingPass

_EARLY_LABELS = (
    "Labels before the runs of `thought_token` (earlier turns of a conversation) are excluded from the loss from now "
    "on, because they are predicted without thoughts. To train on every turn, make one row of each with "
    "`softcot_peft.split_conversations`."
)


class WholeRows(InsertingPass):
    """Locates the thoughts of whole rows, runs the source on the prompts, and inserts the thoughts."""

    labelled: bool = False  # whether the caller requests a loss

    def begin(self, inputs: dict[str, Any]) -> None:
        """Run the source on the prompts and insert the thoughts."""
        placement, own = self.locate(inputs)
        states = self.host.read(inputs.get("input_ids"), placement, self.source, own)
        self.insert_whole(inputs, placement, states)

    def locate(self, inputs: dict[str, Any]) -> tuple[Placement, dict[str, Tensor | None]]:
        """Check the arguments; returns the placement of the thoughts and the caller's own input for the source."""
        own = pop_own(inputs)
        check_arguments(inputs, own)
        self.labelled = inputs.get("labels") is not None
        placement = self.host.locate(inputs, self.source)
        length = tokens(inputs).shape[1]
        check_room(self.host.model, find_cache(inputs), inputs, length, placement.num_inserted)
        _warn_unread(inputs, placement)
        if placement.has_early_labels:
            drop_early_labels(inputs, placement)
            if not placement.inserted:  # with `response_marker`, they are ignored on purpose
                self.host.warn_once(_EARLY_LABELS)
        return placement, own

    def finish(self, output: Any) -> Any:
        """Record the thought positions on the cache, and remove them from the output."""
        self.check_written()
        cache = find_cache(output)
        if cache is not None and self.placement is not None and not isinstance(cache, (Tensor, tuple, list)):
            remember(cache, self.placement, str(self.host.layer.active_name()), self.length)
        return self.add_auxiliary_loss(super().finish(output))

    def add_auxiliary_loss(self, output: Any) -> Any:
        """Add the source's auxiliary loss to the loss of a training step."""
        thoughts = self.thoughts if self.writing is None else self.writing.thoughts
        if thoughts is None or not (self.labelled and self.host.model.training and torch.is_grad_enabled()):
            return output
        extra = self.source.auxiliary_loss(thoughts)
        if extra is None:
            return output
        if isinstance(output, tuple):
            return (output[0] + extra.to(output[0]), *output[1:])
        output["loss"] = output["loss"] + extra.to(output["loss"])
        return output


def _warn_unread(inputs: dict[str, Any], placement: Placement) -> None:
    """Warn if only the last column of the logits depends on the thoughts."""
    labelled = inputs.get("labels") is not None or inputs.get("shift_labels") is not None
    keep = inputs.get("logits_to_keep")  # a number or a tensor of columns
    at_end = placement.inserted and placement.max_span == 0
    if at_end and not labelled and not (isinstance(keep, int) and keep == 1):
        warnings.warn(
            "Without `labels`, thoughts stand after the last token of each row, and all logits before it "
            "are the plain base's. If a response is among the tokens (a loss or log-likelihoods computed outside "
            "of the model, label smoothing), write a run of `thought_token` before it, or set `response_marker`. If "
            "only the next token is wanted, pass `logits_to_keep=1`.",
            stacklevel=2,
        )
