"""The decoding pass: tokens after a KV cache that holds the thoughts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..compat.caches import CACHE_NAME, cache_length, find_cache
from ..rows.arguments import is_padding_mask, pop_own, shift_positions, tokens
from ..rows.columns import restore_keys
from ..rows.placement import Placement
from ..sources import ThoughtSource
from .cache_record import check_room, recall
from .host import Host
from .interface import Pass


class Decoding(Pass):
    """Shifts the mask and positions of the next tokens by the number of thoughts in the cache.

    Args:
        host: The host of the base.
        source: The active adapter's thought source.
        placement: The thought positions of each row; `None`: as recorded on the cache.
    """

    def __init__(self, host: Host, source: ThoughtSource, placement: Placement | None = None) -> None:
        super().__init__(host, source)
        self.placement = placement

    def begin(self, inputs: dict[str, Any]) -> None:
        """Shift the mask and positions."""
        host, cache = self.host, find_cache(inputs)
        if self.placement is None:
            self.placement = recall(cache, host.layer.active_name(), inputs)
            self._reject_late_run(inputs)
        assert self.placement is not None  # noqa: S101  # with an active adapter, `recall` returns one or raises
        pop_own(inputs)
        shift_positions(inputs, self.placement, cache, host.takes_positions)
        check_room(host.model, cache, inputs, cache_length(cache) + tokens(inputs).shape[1])

    def finish(self, output: Any) -> Any:
        """Remove the thought positions from the keys of attentions."""
        placement = self.placement
        if placement is None or not placement.inserted:
            return output
        start, num = placement.start, placement.num_thoughts
        if isinstance(output, tuple):
            return restore_keys(output, start, num)
        if isinstance(output, dict) and output.get("attentions"):
            output["attentions"] = restore_keys(output["attentions"], start, num)
        return output

    def _reject_late_run(self, inputs: dict[str, Any]) -> None:
        """Reject a run of thought tokens after a cache, because the source cannot read the prompt in the cache."""
        ids, mask, token_id = inputs.get("input_ids"), inputs.get("attention_mask"), self.source.thought_token_id
        if token_id is None or ids is None or ids.shape[1] == 1:  # a single one pads a finished row
            return
        is_thought = ids == token_id
        if isinstance(mask, Tensor) and is_padding_mask(mask):
            is_thought = is_thought & (mask[:, -ids.shape[1] :] != 0)
        if is_thought.any():
            raise ValueError(
                f"`{CACHE_NAME}` must not stand before a run of `thought_token`: the assistant reads the whole "
                "prompt, which a cache does not hold. Pass the whole conversation in `input_ids`, without a cache."
            )
