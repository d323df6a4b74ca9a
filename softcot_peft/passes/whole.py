"""The pass over whole rows, with prompts and responses, outside of `generate`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..compat.caches import find_cache
from ..rows.arguments import drop_early_labels, pop_own, repeat_for_chains, tokens
from ..rows.checks import check_arguments
from ..rows.columns import first_of_each
from ..rows.facts import IGNORED
from ..rows.placement import Placement
from .auxiliary import add_auxiliary
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
    rows: int  # number of the caller's rows
    chains: tuple[int, ...] = (0,)  # the chains to run; the logits are those of the first one
    predicted: Tensor  # which tokens predict a label, `(B, L - 1)` bool
    num_items: Tensor | int | None = (
        None  # number of labels of a step that accumulates gradients; `None`: this batch's
    )

    def begin(self, inputs: dict[str, Any]) -> None:
        """Run the source on the prompts and insert the thoughts."""
        placement, own = self.locate(inputs)
        states = self.host.read(inputs.get("input_ids"), placement, self.source, own, chains=self.chains)
        self.insert_chains(inputs, placement, states)

    def insert_chains(self, inputs: dict[str, Any], placement: Placement, states: Tensor) -> None:
        """Insert into whole rows, once for each chain."""
        self.insert_whole(inputs, repeat_for_chains(inputs, placement, states.shape[1]), states)

    def locate(self, inputs: dict[str, Any]) -> tuple[Placement, dict[str, Tensor | None]]:
        """Check the arguments; returns the placement of the thoughts and the caller's own input for the source."""
        own = pop_own(inputs)
        requested = own.pop("chains")
        check_arguments(inputs, own)
        self.rows = len(tokens(inputs))
        self.labelled = inputs.get("labels") is not None
        self.chains = self._choose_chains(requested, inputs)
        placement = self.host.locate(inputs, self.source)
        length = tokens(inputs).shape[1]
        check_room(self.host.model, find_cache(inputs), inputs, length, placement.num_inserted)
        _warn_unread(inputs, placement)
        if placement.has_early_labels:
            drop_early_labels(inputs, placement)
            if not placement.inserted:  # with `response_marker`, they are ignored on purpose
                self.host.warn_once(_EARLY_LABELS)
        if self.labelled:
            self.predicted = inputs["labels"][:, 1:] != IGNORED
            self.num_items = inputs.get("num_items_in_batch")
        return placement, own

    def _choose_chains(self, requested: Any, inputs: dict[str, Any]) -> tuple[int, ...]:
        """Return the chains to run: all for a loss, one for logits."""
        labelled = self.labelled or inputs.get("shift_labels") is not None
        trains = self.host.model.training and torch.is_grad_enabled()
        chains = self.source.select_chains(requested if requested is not None or labelled or trains else 0)
        if len(chains) == 1:
            return chains
        if not labelled:
            raise ValueError(
                f"`chains` must name one chain in a pass without `labels`, whose logits are that chain's, got {chains}"
                f"{'' if requested else ', the default in training'}. Pass `chains=0`, or `labels` to train all; "
                "trainers that compute their loss from logits cannot train several."
            )
        if inputs.get("use_cache") or find_cache(inputs) is not None:
            raise ValueError(
                f"`use_cache` must not be set in a pass that runs the chains {chains}, since its rows are not the "
                "caller's. Pass `chains=0`."
            )
        if "use_cache" in self.host.names:
            inputs["use_cache"] = False
        return chains

    def finish(self, output: Any) -> Any:
        """Record the thought positions on the cache, and remove them from the output."""
        self.check_written()
        cache = find_cache(output)
        if cache is not None and self.placement is not None and not isinstance(cache, (Tensor, tuple, list)):
            remember(cache, self.placement, str(self.host.layer.active_name()), self.length)
        return self.add_auxiliary_loss(self.keep_first_chain(super().finish(output)))

    def keep_first_chain(self, output: Any) -> Any:
        """Keep the rows of the first chain. Loss and log-probabilities are the mean over all."""
        if len(self.chains) == 1:
            return output
        return first_of_each(output, self.rows, len(self.chains))

    def add_auxiliary_loss(self, output: Any) -> Any:
        """Add the source's auxiliary loss to a training step."""
        thoughts = self.thoughts if self.writing is None else self.writing.thoughts
        if thoughts is None or not (self.labelled and self.host.model.training and torch.is_grad_enabled()):
            return output
        extra = self.source.auxiliary_loss(thoughts)
        return output if extra is None else add_auxiliary(output, extra, self.predicted, self.num_items)


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
