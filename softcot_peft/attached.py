"""Finds and removes what this package attaches to a model, however the model is wrapped."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from .compat.engines import device_map_of
from .embedding import SoftCoTLayer

if TYPE_CHECKING:
    from .hooks import ThoughtHooks
    from .passes.host import Host
    from .sources import ThoughtSource

HOOKS = "softcot_hooks"  # the base's attribute that holds the hooks


def hooks_of(model: nn.Module) -> ThoughtHooks:
    """Return the hooks of the base in a model.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` has no SoftCoT adapter.
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


def active(model: nn.Module) -> tuple[Host, ThoughtSource]:
    """Return the base that carries the thoughts, and the source of the active adapter.

    Raises:
        ValueError: The model has no active SoftCoT adapter.
    """
    host = hooks_of(model).host
    source = host.layer.active_source()
    if source is None:
        raise ValueError(
            "`model` must have an active SoftCoT adapter, but its adapters are disabled. Leave `disable_adapter()` "
            "first."
        )
    return host, source


def layer_of(model: nn.Module) -> SoftCoTLayer:
    """Return the wrapped embedding of a model."""
    return next(module for module in model.modules() if isinstance(module, SoftCoTLayer))


def path_of(model: nn.Module, layer: SoftCoTLayer) -> str:
    """Return the module name of the wrapped embedding in a model."""
    return next(name for name, module in model.named_modules() if module is layer)


def remove_hooks(model: nn.Module, prefix: str) -> None:
    """Remove the hooks of a base, if any, and the entries of its device map that start with `prefix`."""
    hooks: ThoughtHooks | None = model.__dict__.pop(HOOKS, None)
    if hooks is not None:
        hooks.remove()
    device_map = device_map_of(model)
    for name in [name for name in device_map if name.startswith(prefix)]:
        del device_map[name]


def discard(model: PeftModel, adapter_name: str) -> None:
    """Remove an adapter that was created for loading but failed to load."""
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    else:
        cast(BaseTuner, model.base_model).unload()


def discard_injected(model: PreTrainedModel, adapter_name: str) -> None:
    """Remove an adapter that transformers' `load_adapter` injected but failed to load."""
    if len(model.peft_config) > 1:
        with warnings.catch_warnings():  # the warning that another adapter is active now
            warnings.simplefilter("ignore", UserWarning)
            model.delete_adapter(adapter_name)
        return
    layer = layer_of(model)
    parent, _, name = path_of(model, layer).rpartition(".")
    setattr(model.get_submodule(parent), name, layer.base_layer)
    model.__dict__.pop(HOOKS).remove()
    del model.peft_config
    model.__dict__.pop("_hf_peft_config_loaded", None)  # the class attribute is False
