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
# Where `accelerate launch` says that processes but the first are to leave weights empty (accelerate 1.15).
_FSDP_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def is_whole(weight: Tensor) -> bool:
    """Whether a weight's values are here: not a shard (FSDP2, ZeRO-3) and not offloaded by accelerate."""
    # FSDP2 leaves a DTensor in a weight's place, DeepSpeed 0.19 an empty tensor, accelerate 1.15 one on meta.
    return not hasattr(weight, "full_tensor") and weight.numel() > 0 and weight.device.type != "meta"


def full_shape(weight: Tensor) -> torch.Size:
    """Shape of a weight, also where DeepSpeed's ZeRO-3 has left an empty tensor in its place (0.19)."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def is_partitioned(model: nn.Module) -> bool:
    """Whether a model's weights are partitioned by DeepSpeed's ZeRO-3 and no engine gathers them when it runs (0.19).

    An engine gathers with hooks on every module that has weights.
    """
    return any(
        hasattr(weight, "ds_shape") and weight.numel() == 0 and not module._forward_pre_hooks
        for module in model.modules()
        for weight in module.parameters(recurse=False)
    )


def device_map_of(model: nn.Module) -> dict[str, Any]:
    """Where accelerate has put a model's modules, to be read and written; empty where it has not."""
    found: dict[str, Any] = getattr(model, "hf_device_map", {})
    return found


def unwrapped(name: str) -> str:
    """A module's or weight's name without what `torch.compile` and FSDP1 add to it, which stands in no file."""
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody has hooked a module's forward (torch 2.6 to 2.13 has no public way to ask)."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def uncompiled(function: _F) -> _F:
    """Have compilers run a function as it is: `torch.compiler.disable`, which alone takes longer than a short hook.

    Args:
        function: Runs by every pass, so that it must cost nothing where nothing is compiled.
    """
    disabled = torch.compiler.disable(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # what a compiler sees of this
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(_F, run)


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Make or load a model whole in every process, whatever engine the base is to be trained with.

    Transformers partitions every model that it makes while DeepSpeed's ZeRO-3 is on, and while accelerate loads for
    FSDP in little memory, it (before 5.23) fills the weights of all processes but the first with nothing. The engine
    puts both right in the models that it wraps.
    """
    # Private in transformers 5.23: the public setters take the object that only this weak reference knows.
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
