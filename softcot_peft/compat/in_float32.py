"""Runs a model of half precision in float32, a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Run everything of a model but its head in float32, so that rounding hides no difference between two passes.

    Weights of half precision are cast a layer at a time, while it runs. A layer is an item of a `ModuleList`, since
    some modules use weights that they do not own, but none uses those of another layer. Quantised weights compute in
    float32 where they have a dtype to compute in (bitsandbytes 0.50); others stay as they are.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart: set[Tensor] = {*embedding.parameters(), *head.parameters()}
    layers = {layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module}
    inside = {part for layer in layers for part in layer.modules() if part is not layer}
    narrow: dict[Tensor, Tensor] = {}
    kept: dict[nn.Module, torch.dtype] = {}

    def weights(module: nn.Module) -> Iterator[Tensor]:
        return (weight for weight in module.parameters(recurse=module in layers) if weight not in apart)

    def widen(module: nn.Module, args: Any) -> None:
        for weight in weights(module):
            if weight.dtype in (torch.bfloat16, torch.float16):
                narrow[weight], weight.data = weight.data, weight.data.float()

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        for weight in weights(module):
            weight.data = narrow.pop(weight, weight.data)

    def to_head(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        dtype = getattr(module, "weight", args[0]).dtype
        return (args[0].to(dtype) if dtype.is_floating_point else args[0], *args[1:])

    handles = [
        embedding.register_forward_hook(lambda module, args, output: output.float()),
        head.register_forward_pre_hook(to_head),
    ]
    for module in model.modules():
        if module not in inside:
            handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
        if isinstance(getattr(module, "compute_dtype", None), torch.dtype):
            kept[module], module.compute_dtype = module.compute_dtype, torch.float32  # type: ignore[assignment]
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, data in narrow.items():  # what was running when something raised
            weight.data = data
        for module, dtype in kept.items():
            module.compute_dtype = dtype  # type: ignore[assignment]
