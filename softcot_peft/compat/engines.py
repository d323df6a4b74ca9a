"""Differences between engines that shard, offload, compile or wrap a model."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.integrations import deepspeed

_F = TypeVar("_F", bound=Callable[..., Any])
# Set by `accelerate launch` if only the first process is to load weights (accelerate 1.15).
_FSDP_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def is_whole(weight: Tensor) -> bool:
    """Return whether a weight is complete and in memory: not sharded (FSDP2, ZeRO-3), not offloaded by accelerate."""
    # FSDP2 puts a DTensor in a weight's place, DeepSpeed 0.19 an empty tensor, accelerate 1.15 a meta tensor.
    return not hasattr(weight, "full_tensor") and weight.numel() > 0 and weight.device.type != "meta"


def full_shape(weight: Tensor) -> torch.Size:
    """Return the shape of a weight, even if DeepSpeed's ZeRO-3 has replaced it with an empty tensor (0.19)."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def is_partitioned(model: nn.Module) -> bool:
    """Return whether DeepSpeed's ZeRO-3 has partitioned a model's weights and no engine gathers them (0.19).

    An engine gathers weights with hooks on every module that has any.
    """
    return any(
        hasattr(weight, "ds_shape") and weight.numel() == 0 and not module._forward_pre_hooks
        for module in model.modules()
        for weight in module.parameters(recurse=False)
    )


def device_map_of(model: nn.Module) -> dict[str, Any]:
    """Return the device map with which accelerate placed a model (the model's own dict); empty if it did not."""
    found: dict[str, Any] = getattr(model, "hf_device_map", {})
    return found


def unwrapped(name: str) -> str:
    """Remove what `torch.compile` and FSDP1 add to names of modules and weights. Files do not contain it."""
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward hooks (torch 2.6 to 2.13 has no public API for this)."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def uncompiled(function: _F) -> _F:
    """Exclude a function from compilation, without the overhead of `torch.compiler.disable` in eager mode.

    That overhead is larger than the run time of a short hook.

    Args:
        function: A function that runs in every forward pass.
    """
    disabled = torch.compiler.disable(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the branch that a compiler traces
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(_F, run)


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Build or load a complete model in every process, regardless of the engine that trains the base.

    While DeepSpeed's ZeRO-3 is active, transformers partitions every model that it builds. With accelerate's
    memory-efficient loading for FSDP, transformers before 5.23 leaves the weights empty in all processes but the
    first. An engine completes only the models that it wraps.
    """
    # Private in transformers 5.23: the public setter needs the object, which only this weak reference holds.
    config, setting = deepspeed._hf_deepspeed_config_weak_ref, os.environ.get(_FSDP_LOADING)
    deepspeed.unset_hf_deepspeed_config()
    if setting is not None:
        os.environ[_FSDP_LOADING] = "false"
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config
        if setting is not None:
            os.environ[_FSDP_LOADING] = setting
