"""Finds what this package has attached to a model, however the model is wrapped, and takes it off again."""

from __future__ import annotations

import warnings
from typing import cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from .compat.engines import device_map_of
from .embedding import SoftCoTLayer
from .hooks import ThoughtHooks

HOOKS = "softcot_hooks"  # attribute of the base that holds its hooks


def hooks_of(model: nn.Module) -> ThoughtHooks:
    """The hooks of the base in a model.

    Raises:
        TypeError: It is no model.
        ValueError: It has no SoftCoT adapter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a model, got {type(model).__name__}.")
    for module in model.modules():
        if HOOKS in module.__dict__:
            hooks: ThoughtHooks = module.__dict__[HOOKS]
            return hooks
    raise ValueError(
        f"`model` must have a SoftCoT adapter, got {type(model).__name__} without one. Call `get_peft_model`, "
        "`PeftModel.from_pretrained` or `load_adapter` first."
    )


def layer_of(model: nn.Module) -> SoftCoTLayer:
    """The wrapped embedding of a model."""
    return next(module for module in model.modules() if isinstance(module, SoftCoTLayer))


def path_of(model: nn.Module, layer: SoftCoTLayer) -> str:
    """The name of the wrapped embedding among a model's modules."""
    return next(name for name, module in model.named_modules() if module is layer)


def remove_hooks(model: nn.Module, place: str) -> None:
    """Take the hooks off a base, and what begins with `place` out of its device map, unless that was done before."""
    hooks: ThoughtHooks | None = model.__dict__.pop(HOOKS, None)
    if hooks is not None:
        hooks.remove()
    places = device_map_of(model)
    for name in [name for name in places if name.startswith(place)]:
        del places[name]


def discard(model: PeftModel, adapter_name: str) -> None:
    """Take an adapter off again that was made to be loaded, and could not be."""
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    else:
        cast(BaseTuner, model.base_model).unload()


def discard_injected(model: PreTrainedModel, adapter_name: str) -> None:
    """As `discard`, where transformers' `load_adapter` injected it and left the rest to its end."""
    if len(model.peft_config) > 1:
        with warnings.catch_warnings():  # that it was active, and another one is now
            warnings.simplefilter("ignore", UserWarning)
            model.delete_adapter(adapter_name)
        return
    layer = layer_of(model)
    parent, _, name = path_of(model, layer).rpartition(".")
    setattr(model.get_submodule(parent), name, layer.base_layer)
    model.__dict__.pop(HOOKS).remove()
    del model.peft_config
    model.__dict__.pop("_hf_peft_config_loaded", None)  # the class says False
