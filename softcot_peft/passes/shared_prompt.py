"""One run of the prompts for the source and the real pass, if the base is its own source."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size  # type: ignore[import-untyped]
from torch import Tensor, nn

from ..compat.caches import CACHE_NAME, can_crop
from ..compat.eval_mode import evaluating
from ..compat.in_float32 import in_float32
from ..compat.models import rotary_switch
from ..embedding import Writing
from ..rows.arguments import PER_TOKEN_OUTPUTS, tokens
from ..rows.placement import Placement
from ..sources import ThoughtSource
from .host import Host
from .interface import ROUNDING, InsertingPass

_LOGGER = logging.getLogger(__name__)
_PER_TOKEN = ("input_ids", "position_ids", "token_type_ids")  # besides the mask, which covers the cache, too
_OTHERS = ("attention_mask", CACHE_NAME, "use_cache", "return_dict", "logits_to_keep", *PER_TOKEN_OUTPUTS)


def shares_prompts(host: Host, source: ThoughtSource, placement: Placement, own: Mapping[str, Tensor | None]) -> bool:
    """Return whether the base's cache of the prompts is the one that its source would compute.

    The source reads in eval mode and outside of autocast, so that dropout and autocast forbid sharing. Padded rows
    need positions that follow from their mask, and rotary frequencies must not depend on the length of a pass.
    """
    if not source.shares_cache or source.precomputed is not None or any(value is not None for value in own.values()):
        return False
    padded = (placement.padded or placement.column is None) and not host.takes_positions
    autocast = torch.is_autocast_enabled(placement.start.device.type)
    drops = host.model.training and _has_dropout(host.model)
    switch = rotary_switch(host.model.config.get_text_config(decoder=True))
    return not (padded or autocast or drops) and switch is None


def _has_dropout(model: nn.Module) -> bool:
    """Return whether a model in training mode drops anything: in its modules, or in attention, as configs say."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return True
    config: Any = model.config
    fields = vars(config.get_text_config(decoder=True))
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in fields.items())


class ContinuedPass(InsertingPass):
    """The pass over thoughts and what follows them, after a run of the prompts that the source shares."""

    states: Tensor  # the source's, `(B, K, N, H_source)`

    def begin_after(self, inputs: dict[str, Any], placement: Placement, cache: Any) -> None:
        """Have the source read the prompts into a cache, and keep the arguments behind the prompts.

        Args:
            inputs: The arguments of a pass over whole rows.
            placement: The thought positions, in the same column of every row.
            cache: Empty; it can be cropped.
        """
        host, mask, num = self.host, _prompt_mask(inputs, placement), placement.num_thoughts
        prompt = inputs["input_ids"][:, : placement.latest]
        self.states, _ = host.read_into(self.source, prompt, mask, num, cache)
        self.insert(inputs, placement, self.states)
        for name in _PER_TOKEN:
            if inputs.get(name) is not None:
                inputs[name] = inputs[name][..., placement.latest :]
        self.writing = Writing(host.layer, self.states, placement.start - placement.latest, tokens(inputs).shape)

    def finish(self, output: Any) -> Any:
        """Return the output of the last columns as it is, which is all that `generate` looks at."""
        self.check_written()
        return output


class PromptSharing:
    """Determines whether a base that is its own source can run the prompts of `generate` once, by trying.

    Args:
        host: The host of the base.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self._results: dict[bool, bool] = {}  # by whether rows are padded

    def allows(self, inputs: dict[str, Any], placement: Placement, cache: Any, source: ThoughtSource) -> bool:
        """Return whether a prefill over whole prompts can be split where its thoughts begin."""
        known = {*_PER_TOKEN, *_OTHERS}
        if (
            not source.shares_cache
            or placement.column is None
            or not can_crop(cache)
            or inputs.get("input_ids") is None
            or any(inputs.get(name) for name in PER_TOKEN_OUTPUTS)
            or any(name not in known for name, value in inputs.items() if value is not None)
        ):
            return False
        if placement.padded not in self._results:
            try:
                agrees = self._try(inputs, placement, cache, source)
                reason = "states or tokens after a cached prompt are not those of whole rows"
            except Exception as error:  # models not written for this may fail in any way
                if should_reduce_batch_size(error):  # out of memory: no result for the model
                    return False
                agrees, reason = False, f"it cannot continue from a cached prompt ({error})"
            self._results[placement.padded] = agrees
            if not agrees:
                _LOGGER.info("%s runs prompts twice, for source and pass: %s.", type(self.host.model).__name__, reason)
        return self._results[placement.padded]

    def _try(self, inputs: dict[str, Any], placement: Placement, cache: Any, source: ThoughtSource) -> bool:
        """Compare states and next tokens of both ways, on the shortest and the longest prompt, in float32.

        Some models read one token at a time after a cache, or count positions by column, and no config tells.
        """
        lengths = _prompt_mask(inputs, placement).sum(1)
        pick = torch.stack([lengths.argmin(), lengths.argmax()])
        rows = {name: value[pick] for name, value in inputs.items() if name in (*_PER_TOKEN, "attention_mask")}
        rows["return_dict"], few = True, placement.select(pick)
        with torch.no_grad(), evaluating(self.host.model), in_float32(self.host.model):
            states = self.host.read(rows["input_ids"], few, source)
            continued, whole = ContinuedPass(self.host, source), InsertingPass(self.host, source)
            rest, own = {**rows, "use_cache": True, CACHE_NAME: copy.deepcopy(cache)}, copy.copy(rows)
            continued.begin_after(rest, few, rest[CACHE_NAME])
            found = continued.run(rest).logits[:, -1]
            whole.insert_whole(own, few, states)
            pairs = (whole.run(own | {"use_cache": False}).logits[:, -1], found), (states, continued.states)
            return all(bool((one - two).norm() <= ROUNDING * one.norm()) for one, two in pairs)


def _prompt_mask(inputs: dict[str, Any], placement: Placement) -> Tensor:
    """Return the mask of the prompts of a prefill, `(B, P)`, 1 = attended."""
    mask = placement.attention_mask
    if mask is None:
        mask = torch.ones_like(tokens(inputs))
    return mask[:, : placement.latest]
