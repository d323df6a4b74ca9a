"""Projections: trained modules that map a source's hidden states to the base's input embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..compat.engines import is_whole
from ..config import SoftCoTConfig
from .registry import Registry

_P = TypeVar("_P", bound=type[nn.Module])

PROJECTIONS: Registry[nn.Module] = Registry("projection", "register_projection")


def register_projection(name: str) -> Callable[[_P], _P]:
    """Register a projection class under the name that `SoftCoTConfig(projection=...)` refers to. A class decorator.

    The class takes `(source_size, base_size, config)`. Its `forward` maps `(B, K, N, source_size)` to
    `(B, K, N, base_size)`. Its parameters are trained and saved. A method `initialise(kind)`, if it has one, is called
    with `"identity"` or `"zero"` if the config asks for them, and `rescale(factor)` for `"matched"`.

    Args:
        name: The name that configs refer to.

    Returns:
        The decorator, which returns the class unchanged.

    Raises:
        ValueError: Another class is registered under the name.

    Example:
        ```python
        from softcot_peft import SoftCoTConfig
        from softcot_peft.sources import register_projection
        from torch import nn

        @register_projection("two_layers")
        class TwoLayers(nn.Sequential):
            def __init__(self, source_size: int, base_size: int, config: SoftCoTConfig) -> None:
                super().__init__(nn.Linear(source_size, 256), nn.GELU(), nn.Linear(256, base_size))
        ```
    """
    return PROJECTIONS.register(name)


def make_projection(config: SoftCoTConfig, source_size: int, base_size: int) -> nn.Module:
    """Create and initialise the projection that a config names.

    Raises:
        ValueError: No projection is registered under the name, or it has no such initialisation.
    """
    name, kind = config.projection, config.projection_init
    projection = PROJECTIONS.find(name)(source_size, base_size, config)
    if kind not in ("default", "matched"):
        initialise = getattr(projection, "initialise", None)
        if not callable(initialise):
            raise ValueError(
                f"`projection_init` must be 'default' with `projection={name!r}`, which has no method `initialise`, "
                f"got {kind!r}."
            )
        initialise(kind)
    return projection


def check_whole(weight: Tensor, what: str = "The projection's weights") -> None:
    """Check that a weight is here when it is needed, after engines had the chance to bring it in.

    Raises:
        RuntimeError: The weight is sharded or offloaded and not gathered, or was never loaded.
    """
    if not is_whole(weight):
        raise RuntimeError(
            f"{what} must be here when they are needed, but they are sharded or offloaded, or were made "
            "with `low_cpu_mem_usage=True` and never loaded. Engines bring sharded ones in while the input "
            "embedding runs: pass `input_ids` instead of `inputs_embeds`. After `cpu_offload` or `disk_offload`, "
            "load adapters with `PeftModel.from_pretrained` instead of `load_adapter`. To load them otherwise, "
            "call `load_adapter` or `set_peft_model_state_dict`."
        )


def project(projection: nn.Module, states: Tensor) -> Tensor:
    """Project states `(B, K, N, H_source)` to `(B, K, N, H_base)`, in the projection's dtype, outside of autocast."""
    weight = next(projection.parameters(), None)
    if weight is not None:  # offloaded weights do not show the device they run on
        states = states.to(weight) if is_whole(weight) else states.to(weight.dtype)
    with torch.autocast(states.device.type, enabled=False):  # training and inference compute the same
        projected: Tensor = projection(states)
    return projected
