"""Known reasons why a training step cannot run in two passes: the base, the batch or the arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..compat.caches import CACHE_NAME
from ..compat.engines import has_hooks, is_whole
from ..compat.models import checkpoints, rotary_switch
from ..rows.arguments import PER_TOKEN_OUTPUTS
from ..rows.placement import Placement
from .host import Host

SPLIT_ARGUMENTS = ("input_ids", "attention_mask", "labels")  # the arguments that can be split between the passes
CHECKPOINTING = (
    "Gradient checkpointing turns two-pass training off: it keeps no cache, and a step takes about twice the time. "
    "Two passes store no activations of prompts, so checkpointing is rarely needed. Pass "
    "`gradient_checkpointing=False` (TRL's trainers turn it on by default), or `two_pass_training=False` in the "
    "adapter's config to use one pass."
)


def obstacle(host: Host, inputs: dict[str, Any], placement: Placement) -> str | None:
    """Return why a step must run in one pass; `None` if no reason is known."""
    return _of_base(host) or _of_batch(host, inputs, placement) or _of_arguments(host, inputs)


def _of_base(host: Host) -> str | None:
    model = host.model
    if CACHE_NAME not in host.names:
        return "its forward takes no cache"
    if checkpoints(model):
        return CHECKPOINTING
    if any(has_hooks(module) for module in model.get_input_embeddings().modules()):
        return "a hook on its input embedding may depend on the length of a pass, as NEFTune's noise does"
    own = {weight for source in host.layer.softcot_source.values() for weight in source.parameters()}
    if any(weight.requires_grad and weight not in own for weight in model.parameters()):
        return "weights of the base are trained, so that prompts have gradients too"
    if not all(is_whole(weight) for weight in model.parameters()):
        return "its weights are sharded or offloaded, and brought in once a step"
    return None


def _of_batch(host: Host, inputs: dict[str, Any], placement: Placement) -> str | None:
    if placement.latest < placement.num_thoughts:  # masks after a cache have the shape (rest, all columns)
        return "prompts are shorter than the thoughts"
    if inputs.get("input_ids") is None:
        return "`inputs_embeds` are given"
    switch = rotary_switch(host.model.config.get_text_config(decoder=True))
    if switch is not None and inputs["input_ids"].shape[1] + placement.num_inserted > switch:
        return f"its rotary frequencies change with rows longer than {switch}"
    return None


def _of_arguments(host: Host, inputs: dict[str, Any]) -> str | None:
    for name, value in inputs.items():
        if name not in SPLIT_ARGUMENTS and isinstance(value, Tensor) and value.dim() > 1:
            return f"`{name}` is given"
    keep = inputs.get("logits_to_keep")  # a number or a tensor of columns
    if isinstance(keep, Tensor) or keep or inputs.get("use_cache"):
        return "`logits_to_keep` or `use_cache` is given"
    config = host.model.config.get_text_config(decoder=True)
    for name, required in {**dict.fromkeys(PER_TOKEN_OUTPUTS, False), "return_dict": True}.items():
        given = inputs.get(name)
        if bool(getattr(config, name, required) if given is None else given) is not required:
            return f"`{name}` is {not required}"
    return None
