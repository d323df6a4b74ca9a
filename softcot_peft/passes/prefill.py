"""The prefill pass of `generate`: whole prompts, chunks of prompts, or all tokens in each step without a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..compat.caches import cache_length, find_cache
from ..rows.arguments import tokens
from ..rows.columns import repeat_rows
from ..sources import ThoughtSource
from .generation import Generation
from .host import Host
from .interface import InsertingPass
from .shared_prompt import ContinuedPass, PromptSharing


class Prefill(InsertingPass):
    """Inserts the thoughts of a running `generate` call. Rows with the same prompt share one row if possible.

    Args:
        host: The host of the base.
        source: The active adapter's thought source.
        generation: The running `generate` call.
        sharing: Whether the source can share the run of the prompts.
    """

    continued: ContinuedPass | None = None  # the pass after the prompts, if the source has shared their run
    repeats: Tensor | None = None  # index of each caller's row among this pass's rows, `(B,)`; `None`: not shared

    def __init__(self, host: Host, source: ThoughtSource, generation: Generation, sharing: PromptSharing) -> None:
        super().__init__(host, source)
        self.generation = generation
        self.sharing = sharing

    def begin(self, inputs: dict[str, Any]) -> None:
        """Insert the thoughts, unless a later chunk of the prompts does."""
        generation, cache = self.generation, find_cache(inputs)
        batch, length = tokens(inputs).shape[:2]
        placement = generation.placement_of(batch)
        seen = 0 if generation.prefilled else generation.consumed
        if generation.prefilled and length < generation.length:
            raise RuntimeError(
                f"`generate` passed {length} tokens, fewer than the prompt's {generation.length}, and no cache that "
                f"holds the rest, so {type(self.host.model).__name__} cannot carry thoughts while decoding. Report it."
            )
        generation.consumed = seen + length
        if placement.inserted and not generation.prefilled:
            return  # thoughts are inserted into the last chunk
        rows = generation.prompts_of(batch)
        whole = seen == 0 and cache_length(cache) == 0
        if whole and generation.shares(inputs, cache):
            placement, self.repeats = generation.keep_distinct(inputs), rows
        if whole and not generation.has_read and self.sharing.allows(inputs, placement, cache, self.source):
            self.continued = ContinuedPass(self.host, self.source)
            self.continued.begin_after(inputs, placement, cache)
            self.placement, self.writing = placement, self.continued.writing
        elif self.repeats is not None:
            self.insert(inputs, placement, generation.states)
        else:
            self.insert(inputs, placement, generation.states[rows], seen)

    def finish(self, output: Any) -> Any:
        """Remove the thought positions from the output, and repeat shared rows."""
        output = super().finish(output) if self.continued is None else self.continued.finish(output)
        if self.repeats is not None and self.placement is not None:
            cache = find_cache(output)
            output = repeat_rows(output, self.repeats, len(self.placement.start))
            cache.batch_select_indices(self.repeats)
        return output
