"""Wraps or rejects entry points of the base that bypass the hooks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel

from .embedding import SoftCoTLayer

# Methods of transformers' continuous batching, which packs rows and runs in a separate thread (5.23).
_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class WrappedMethod:
    """Wraps a method of a model instance with a function.

    A class rather than a closure, so that models can still be pickled and copied: it stores no bound method.
    """

    def __init__(self, model: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self.model = model
        self.name = name
        self.function = function
        self.earlier = model.__dict__.get(name)
        self.removed = False
        setattr(model, name, self)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The original method; `inspect.signature` reads this."""
        kind = type(self.model)
        method = inspect.getattr_static(kind, self.name)  # static methods must not be bound
        original: Callable[..., Any] = self.earlier or method.__get__(self.model, kind)
        return original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the original method as its first argument."""
        if self.removed:  # another wrapper still holds this one
            return self.__wrapped__(*args, **kwargs)
        return self.function(self.__wrapped__, *args, **kwargs)

    def remove(self) -> None:
        """Restore the original method, unless another wrapper has replaced this one."""
        self.removed = True
        if self.model.__dict__.get(self.name) is self:
            delattr(self.model, self.name)
            if self.earlier is not None:
                setattr(self.model, self.name, self.earlier)


def guard(model: PreTrainedModel, layer: SoftCoTLayer) -> list[WrappedMethod]:
    """Replace the methods that cannot carry thoughts by ones that raise an error; returns the wrappers."""
    batching = [
        WrappedMethod(model, name, functools.partial(_reject_if_active, layer, name))
        for name in _BATCHING
        if hasattr(model, name)
    ]
    return [
        *batching,
        WrappedMethod(model, "resize_token_embeddings", _reject_resize),
        # `nn.DataParallel` calls this on every module (torch 2.6 to 2.13).
        WrappedMethod(model, "_replicate_for_data_parallel", _reject_replicas),
    ]


def _reject_if_active(layer: SoftCoTLayer, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if layer.active_source() is None:
        return original(*args, **kwargs)
    raise ValueError(
        f"`{name}` must not be called with an active SoftCoT adapter: continuous batching packs rows, and a packed "
        "row has only one place for thoughts. Call `generate` with a padded batch, or disable the adapter."
    )


def _reject_resize(original: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "`resize_token_embeddings` must be called before a SoftCoT adapter is attached, since it replaces the input "
        "embedding, which carries the thoughts. Call `unload()`, resize, and attach or load the adapter again."
    )


def _reject_replicas(original: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "`nn.DataParallel` must not copy a base with a SoftCoT adapter, since the copies would run without its "
        "thoughts. Start one process per GPU (`accelerate launch` or `torchrun`), or show the process one GPU with "
        "`CUDA_VISIBLE_DEVICES=0`."
    )


def backbones(model: PreTrainedModel, layer: SoftCoTLayer) -> Iterator[PreTrainedModel]:
    """Yield the submodels of a base that contain its input embedding, outermost first; usually `model.model`."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module is not model and any(m is layer for m in module.modules()):
            yield module


def reject_backbone(model: nn.Module, backbone: nn.Module) -> NoReturn:
    """Raise the error for a direct call of a base's backbone."""
    name = type(model).__name__
    raise ValueError(
        f"`{type(backbone).__name__}` was called outside of a call of `{name}`, which inserts the thoughts, and "
        f"would run without them. Call the {name} itself, as `model(...)`, not its `forward` or its backbone; "
        "turn off fused losses that call the backbone; or disable the adapter."
    )
