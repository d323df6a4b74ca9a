"""`Pass`: one forward of a base, from the pre-hook to the forward hook, and what its kinds share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compat.caches import find_cache
from ..embedding import RUNNING, Running, Writing
from ..rows.arguments import insert_thoughts, tokens
from ..rows.columns import restore
from ..rows.placement import Placement, positions
from ..sources import ThoughtSource
from .cache_record import check_room
from .host import Host


class Pass:
    """One forward of a base. As it is, it changes nothing: a chunk of a prompt before its thoughts.

    The hooks choose a kind. `begin` translates the forward's arguments, in place, to what the base sees; the wrapped
    embedding writes what `writing` says; `finish` puts the outputs back in line with the caller's tokens.

    Args:
        host: The base that runs.
        source: The active adapter's.
    """

    def __init__(self, host: Host, source: ThoughtSource) -> None:
        self.host = host
        self.source = source
        self.writing: Writing | None = None
        self.outer: Running | None = None  # the pass that was running before

    def begin(self, inputs: dict[str, Any]) -> None:
        """Translate the forward's arguments."""

    def finish(self, output: Any) -> Any:
        """Translate the forward's output."""
        return output

    def run(self, inputs: dict[str, Any]) -> Any:
        """Run the base's forward past the hooks: arguments and output are the base's own."""
        token = RUNNING.set(self)
        try:
            return self.host.model.forward(**inputs)
        finally:
            RUNNING.reset(token)

    def check_written(self) -> None:
        """Reject a forward that has not looked its ids up in the wrapped embedding.

        Raises:
            RuntimeError: The thoughts were not written.
        """
        if self.writing is None or self.writing.thoughts is not None:
            return
        raise RuntimeError(
            f"The input embedding of {type(self.host.model).__name__} must write the thoughts, but was not run on the "
            "ids of this pass. If it was replaced after the adapter was attached, unload the adapter, replace it, and "
            "load it again; if not, the model adds to its ids before it looks them up, and cannot carry thoughts."
        )


class InsertingPass(Pass):
    """A pass that has thought positions among its columns."""

    placement: Placement | None = None  # where the thoughts stand in this pass's columns; `None` before `insert`
    length: int  # the caller's columns
    thoughts: Tensor | None = None  # soft thoughts that were written into embeddings of the caller
    # The caller's columns whose logits were asked for, if both of their possible rows were computed.
    kept: Tensor | None = None
    last_rows: bool = False  # whether only the last rows of logits were asked for

    def insert(self, inputs: dict[str, Any], placement: Placement, states: Tensor, seen: int = 0) -> None:
        """Insert the thought positions, and say what is written there.

        Args:
            inputs: The forward's arguments.
            placement: Where the thoughts stand in the rows.
            states: What they are made of, `(B, K, N, H_source)`.
            seen: Columns of the rows that earlier passes have read.
        """
        host = self.host
        batch, self.length = tokens(inputs).shape[:2]
        if inputs.get("inputs_embeds") is not None:
            self.thoughts = host.layer.soft_thoughts(states)
        written = None if self.thoughts is None else self.thoughts.flatten(0, 1)
        self.kept, self.last_rows = insert_thoughts(inputs, placement, written, host.filler(self.source), seen)
        width = self.length + placement.num_inserted
        check_room(host.model, find_cache(inputs), inputs, seen + width)
        self.placement = placement.after(seen)
        if written is None:
            self.writing = Writing(host.layer, states, self.placement.start, torch.Size((batch, width)))

    def insert_whole(self, inputs: dict[str, Any], placement: Placement, states: Tensor) -> None:
        """As `insert`, into whole rows: the base is told the positions of padded ones."""
        if placement.padded and self.host.takes_positions and inputs.get("position_ids") is None:
            inputs["position_ids"] = positions(inputs["attention_mask"])
        self.insert(inputs, placement, states)

    def finish(self, output: Any) -> Any:
        """Take the thought positions out of the output."""
        self.check_written()
        placement = self.placement
        if placement is None or not placement.inserted:
            return output
        start, num, column = placement.start, placement.num_thoughts, placement.column
        return restore(output, start, num, self.length, self.kept, self.last_rows, column)
