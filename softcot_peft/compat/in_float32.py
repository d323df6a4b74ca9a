"""Runs a half-precision model in float32, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Run a model, except its head, in float32, so that rounding does not hide differences between two passes.

    Half-precision weights are cast one layer at a time, while the layer runs. A layer is an item of a `ModuleList`:
    some modules use weights of other modules, but never those of another layer. Quantised weights with a compute
    dtype (bitsandbytes 0.50) compute in float32; others are not changed.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    excluded: set[Tensor] = {*embedding.parameters(), *head.parameters()}
    layers = {layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module}
    inside = {part for layer in layers for part in layer.modules() if part is not layer}
    original_data: dict[Tensor, Tensor] = {}
    compute_dtypes: dict[nn.Module, torch.dtype] = {}

    def weights(module: nn.Module) -> Iterator[Tensor]:
        return (weight for weight in module.parameters(recurse=module in layers) if weight not in excluded)

    def cast_weights(module: nn.Module, args: Any) -> None:
        for weight in weights(module):
            if weight.dtype in (torch.bfloat16, torch.float16):
                original_data[weight], weight.data = weight.data, weight.data.float()

    def restore_weights(module: nn.Module, args: Any, output: Any) -> None:
        for weight in weights(module):
            weight.data = original_data.pop(weight, weight.data)

    def cast_head_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        dtype = getattr(module, "weight", args[0]).dtype
        return (args[0].to(dtype) if dtype.is_floating_point else args[0], *args[1:])

    handles = [
        embedding.register_forward_hook(lambda module, args, output: output.float()),
        head.register_forward_pre_hook(cast_head_input),
    ]
    for module in model.modules():
        if module not in inside:
            handles += [module.register_forward_pre_hook(cast_weights), module.register_forward_hook(restore_weights)]
        if isinstance(getattr(module, "compute_dtype", None), torch.dtype):
            compute_dtypes[module], module.compute_dtype = module.compute_dtype, torch.float32  # type: ignore[assignment]
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, data in original_data.items():  # of the layer that was running if an error was raised
            weight.data = data
        for module, dtype in compute_dtypes.items():
            module.compute_dtype = dtype  # type: ignore[assignment]
