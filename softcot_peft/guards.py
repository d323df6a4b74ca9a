"""Wraps or rejects entry points of the base that bypass the hooks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel

from .embedding import SoftCoTLayer

# Methods of transformers' continuous batching, which packs rows and runs in a thread of its own (5.23).
_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class Replaced:
    """A method of a model instance, wrapped by a function of ours.

    Written as a class so that models can still be pickled and copied: nothing bound is stored but the model.
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
        method = inspect.getattr_static(kind, self.name)  # a static one is not to be bound
        original: Callable[..., Any] = self.earlier or method.__get__(self.model, kind)
        return original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the original method before the arguments."""
        if self.removed:  # somebody wrapped this one, and holds it still
            return self.__wrapped__(*args, **kwargs)
        return self.function(self.__wrapped__, *args, **kwargs)

    def remove(self) -> None:
        """Put the original back, unless somebody has replaced this one in turn."""
        self.removed = True
        if self.model.__dict__.get(self.name) is self:
            delattr(self.model, self.name)
            if self.earlier is not None:
                setattr(self.model, self.name, self.earlier)


def guard(model: PreTrainedModel, layer: SoftCoTLayer) -> list[Replaced]:
    """Reject the methods that cannot carry thoughts; returns what was replaced."""
    refused = [
        Replaced(model, name, functools.partial(_unless_active, layer, name))
        for name in _BATCHING
        if hasattr(model, name)
    ]
    return [
        *refused,
        Replaced(model, "resize_token_embeddings", _resize),
        # What `nn.DataParallel` calls on every module (torch 2.6 to 2.13).
        Replaced(model, "_replicate_for_data_parallel", _replicate),
    ]


def _unless_active(layer: SoftCoTLayer, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if layer.active_source() is None:
        return original(*args, **kwargs)
    raise ValueError(
        f"`{name}` must not be called with an active SoftCoT adapter: continuous batching packs rows, and a packed "
        "row has one place for thoughts. Call `generate` with a padded batch, or disable the adapter."
    )


def _resize(original: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "`resize_token_embeddings` must be called before a SoftCoT adapter is attached, since it replaces the input "
        "embedding, which carries the thoughts. Call `unload()`, resize, and attach or load the adapter again."
    )


def _replicate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "`nn.DataParallel` must not copy a base with a SoftCoT adapter, since the copies would run without its "
        "thoughts. Start one process per GPU (`accelerate launch` or `torchrun`), or show the process one GPU with "
        "`CUDA_VISIBLE_DEVICES=0`."
    )


def backbones(model: PreTrainedModel, layer: SoftCoTLayer) -> Iterator[PreTrainedModel]:
    """The models within a base that hold its input embedding: what `model.model` is in most, from the outside in."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module is not model and any(m is layer for m in module.modules()):
            yield module


def reject_backbone(model: nn.Module, backbone: nn.Module) -> NoReturn:
    """Say that a base's backbone was called by itself."""
    name = type(model).__name__
    raise ValueError(
        f"`{type(backbone).__name__}` was called outside of a call of `{name}`, which is where thoughts are placed, "
        f"and would run without them. Call the {name} itself, as `model(...)`, not its `forward` or its backbone; "
        "turn off fused losses that call the backbone; or disable the adapter."
    )
