"""Projections: trained modules that map a source's hidden states to the base's input embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..compat.engines import is_whole

_P = TypeVar("_P", bound=type[nn.Module])

_registered: dict[str, type[nn.Module]] = {}


def register_projection(name: str) -> Callable[[_P], _P]:
    """Register a projection class under the name that `SoftCoTConfig(projection=...)` refers to. A class decorator.

    The class takes `(source_size, base_size, init_weights)`. Its `forward` maps `(B, K, N, source_size)` to
    `(B, K, N, base_size)`. Its parameters are trained and saved.

    Args:
        name: The name that configs refer to.

    Returns:
        The decorator, which returns the class unchanged.

    Raises:
        ValueError: Another class is registered under the name.

    Example:
        ```python
        from softcot_peft.sources import register_projection
        from torch import nn

        @register_projection("two_layers")
        class TwoLayers(nn.Sequential):
            def __init__(self, source_size: int, base_size: int, init_weights: bool) -> None:
                super().__init__(nn.Linear(source_size, 256), nn.GELU(), nn.Linear(256, base_size))
        ```
    """

    def register(projection: _P) -> _P:
        known = _registered.setdefault(name, projection)
        if (known.__module__, known.__qualname__) != (projection.__module__, projection.__qualname__):
            raise ValueError(f"`name` must be new, got {name!r}, which {known.__qualname__} has. Choose another.")
        _registered[name] = projection
        return projection

    return register


def make_projection(name: str, source_size: int, base_size: int, init_weights: bool) -> nn.Module:
    """Create the projection that a config names.

    Raises:
        ValueError: No projection is registered under the name.
    """
    if name not in _registered:
        raise ValueError(
            f"`projection` must be one of {sorted(_registered)}, got {name!r}. If it is your own, import the module "
            "that calls `register_projection` first."
        )
    return _registered[name](source_size, base_size, init_weights)


@register_projection("linear")
class LinearProjection(nn.Linear):
    """`s = W t + b` (section 3 of arXiv 2502.12134).

    Args:
        source_size: Width of t.
        base_size: Width of s.
        init_weights: `True`: the default initialisation of `nn.Linear`. `False`: standard normal values, large enough
            for tests to see an effect.
    """

    def __init__(self, source_size: int, base_size: int, init_weights: bool = True) -> None:
        super().__init__(source_size, base_size)
        if not init_weights:
            nn.init.normal_(self.weight)
            nn.init.normal_(self.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Project `(..., H_source)` to `(..., H_base)`, in the projection's dtype and on its device.

        Raises:
            RuntimeError: The weights are sharded or offloaded and not gathered, or were never loaded.
        """
        if not is_whole(self.weight):  # checked here, after accelerate's hooks have loaded offloaded weights
            raise RuntimeError(
                "The projection's weights must be here when it runs, but they are sharded or offloaded, or were made "
                "with `low_cpu_mem_usage=True` and never loaded. Engines bring sharded ones in while the input "
                "embedding runs: pass `input_ids` instead of `inputs_embeds`. After `cpu_offload` or `disk_offload`, "
                "load adapters with `PeftModel.from_pretrained` instead of `load_adapter`. To load them otherwise, "
                "call `load_adapter` or `set_peft_model_state_dict`."
            )
        return super().forward(states.to(self.weight))


def project(projection: nn.Module, states: Tensor) -> Tensor:
    """Project states `(B, K, N, H_source)` to `(B, K, N, H_base)`, in the projection's dtype, outside of autocast."""
    weight = next(projection.parameters(), None)
    if weight is not None:  # offloaded weights do not show the device they run on
        states = states.to(weight) if is_whole(weight) else states.to(weight.dtype)
    with torch.autocast(states.device.type, enabled=False):  # training and inference compute the same
        projected: Tensor = projection(states)
    return projected
