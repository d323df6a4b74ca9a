"""`Pass`: one forward of the base, from the pre-hook to the forward hook; the base class of all kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compat.caches import find_cache
from ..embedding import Writing
from ..rows.arguments import insert_thoughts, tokens
from ..rows.columns import restore
from ..rows.placement import Placement, positions
from ..running import RUNNING, Running
from ..sources import ThoughtSource
from .cache_record import check_room
from .host import Host

ROUNDING = 1e-3  # relative difference of two ways to run a base; TF32 rounds as coarsely as float16


class Pass:
    """One forward of the base. This class changes nothing, as for a chunk of a prompt before its thoughts.

    The hooks choose the class. `begin` translates the arguments for the base, in place; the wrapped embedding
    writes the thoughts described by `writing`; `finish` aligns the outputs with the caller's tokens.

    Args:
        host: The host of the base.
        source: The active adapter's thought source.
    """

    def __init__(self, host: Host, source: ThoughtSource) -> None:
        self.host = host
        self.source = source
        self.writing: Writing | None = None
        self.outer: Running | None = None  # the pass that was running before this one

    def begin(self, inputs: dict[str, Any]) -> None:
        """Translate the forward's arguments."""

    def finish(self, output: Any) -> Any:
        """Translate the forward's output."""
        return output

    def run(self, inputs: dict[str, Any]) -> Any:
        """Run the base's `forward` without the hooks: arguments and output are those of the base."""
        token = RUNNING.set(self)
        try:
            return self.host.model.forward(**inputs)
        finally:
            RUNNING.reset(token)

    def check_written(self) -> None:
        """Check that the wrapped embedding has written the thoughts.

        Raises:
            RuntimeError: The base did not look up the ids of this pass in the wrapped embedding.
        """
        if self.writing is None or self.writing.thoughts is not None:
            return
        raise RuntimeError(
            f"The input embedding of {type(self.host.model).__name__} must write the thoughts, but was not run on the "
            "ids of this pass. If it was replaced after the adapter was attached, unload the adapter, replace it, and "
            "load it again; if not, the model adds to its ids before it looks them up, and cannot carry thoughts."
        )


@torch.no_grad()
def run_prompts(host: Host, source: ThoughtSource, prompt: dict[str, Any]) -> Any:
    """Run prompts without thoughts, gradient and, if possible, logits; returns their cache.

    Args:
        host: The host of the base.
        source: The active adapter's thought source.
        prompt: The per-token arguments, over `(B, P)` tokens.
    """
    inputs = {**prompt, "use_cache": True, "return_dict": True}
    if "logits_to_keep" in host.names:
        inputs["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=prompt["input_ids"].device)
    return find_cache(Pass(host, source).run(inputs))


class InsertingPass(Pass):
    """A pass whose columns include thought positions."""

    placement: Placement | None = None  # in this pass's columns; `None` before `insert`
    length: int  # number of the caller's columns
    thoughts: Tensor | None = None  # soft thoughts written into the caller's `inputs_embeds`
    # The caller's columns in `logits_to_keep`, if the logits of both placed columns of each are computed.
    requested: Tensor | None = None
    last_rows: bool = False  # whether only the logits of the last columns are requested

    def insert(self, inputs: dict[str, Any], placement: Placement, states: Tensor, seen: int = 0) -> None:
        """Insert the thought positions and set `writing`.

        Args:
            inputs: Arguments of the forward.
            placement: The thought positions.
            states: The source's states, `(B, K, N, H_source)`.
            seen: Number of columns that earlier passes have processed.
        """
        host = self.host
        batch, self.length = tokens(inputs).shape[:2]
        if inputs.get("inputs_embeds") is not None:
            self.thoughts = host.layer.soft_thoughts(states)
        written = None if self.thoughts is None else self.thoughts.flatten(0, 1)
        self.requested, self.last_rows = insert_thoughts(inputs, placement, written, host.filler(self.source), seen)
        width = self.length + placement.num_inserted
        check_room(host.model, find_cache(inputs), inputs, seen + width)
        self.placement = placement.after(seen)
        if written is None:
            self.writing = Writing(host.layer, states, self.placement.start, torch.Size((batch, width)))

    def insert_whole(self, inputs: dict[str, Any], placement: Placement, states: Tensor) -> None:
        """Insert into whole rows, and pass position ids if they are padded."""
        if placement.padded and self.host.takes_positions and inputs.get("position_ids") is None:
            inputs["position_ids"] = positions(inputs["attention_mask"])
        self.insert(inputs, placement, states)

    def finish(self, output: Any) -> Any:
        """Remove the thought positions from the output."""
        self.check_written()
        placement = self.placement
        if placement is None or not placement.inserted:
            return output
        start, num, column = placement.start, placement.num_thoughts, placement.column
        return restore(output, start, num, self.length, self.requested, self.last_rows, column)
