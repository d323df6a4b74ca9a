"""One run of the prompts for both the source and the real pass, where the base is its own source."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..compat.caches import CACHE_NAME, cache_length, is_dynamic
from ..compat.models import rotary_switch
from ..rows.arguments import PER_TOKEN_OUTPUTS, tokens
from ..rows.placement import Placement, positions
from .host import Host

# Arguments of a forward whose values for the prompts are known.
_PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
_OTHERS = (CACHE_NAME, "use_cache", "return_dict", "logits_to_keep", *PER_TOKEN_OUTPUTS)


def can_share(host: Host, placement: Placement) -> bool:
    """Whether the base goes on from a cache of prompts as it reads whole rows, and reads them as its source does.

    Its source reads in eval mode and outside of autocast: dropout and autocast would make the prompts' cache another
    one. Rows that are moved have to have positions that follow their mask.
    """
    config = host.model.config.get_text_config(decoder=True)
    autocast = torch.is_autocast_enabled(host.layer.weight.device.type)
    padded = placement.padded and not host.takes_positions
    return not (autocast or padded or (host.model.training and _drops(host.model))) and rotary_switch(config) is None


def _drops(model: nn.Module) -> bool:
    """Whether a model in training mode drops anything: by its modules, or by its config (attention does)."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return True
    config: Any = model.config
    fields = config.get_text_config(decoder=True).to_dict()
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in fields.items())


def shares_prefill(host: Host, inputs: dict[str, Any], placement: Placement, cache: Any) -> bool:
    """Whether a prefill of `generate` can be divided where its thoughts begin."""
    start, known = placement.column, {*_PER_TOKEN, *_OTHERS}
    return (
        start is not None
        and start > 0
        and can_share(host, placement)
        and is_dynamic(cache)
        and cache_length(cache) == 0
        and inputs.get("input_ids") is not None
        and not any(inputs.get(name) for name in PER_TOKEN_OUTPUTS)
        and all(name in known for name, value in inputs.items() if value is not None)
    )


def prompt_arguments(host: Host, inputs: dict[str, Any], placement: Placement) -> dict[str, Any]:
    """The arguments of a pass over the prompts of a prefill, which end before column `placement.column`."""
    start, batch = placement.column or 0, len(tokens(inputs))
    prompt = {name: inputs[name][..., :start] for name in _PER_TOKEN if isinstance(inputs.get(name), Tensor)}
    if host.takes_positions and placement.padded and "position_ids" not in prompt:
        prompt["position_ids"] = positions(prompt["attention_mask"])
    if "logits_to_keep" in host.names:
        prompt["logits_to_keep"] = torch.empty(0, dtype=torch.long, device=prompt["input_ids"].device)
    assert len(prompt["input_ids"]) == batch  # noqa: S101
    return prompt
