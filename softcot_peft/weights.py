"""Checks what a file brings before it enters a model: the projection's two tensors, and nothing else of the model.

Adapter files come from strangers. PEFT and transformers load every tensor whose name they find in the model, so that a
file could replace weights of the base; here nothing but the projection passes. Knows no hooks and no config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ._compat import unwrapped
from .layer import SoftCoTLayer
from .untrusted import pickled

_OWN = "softcot_projection."
_PARTS = ("weight", "bias")
_PREFIX = "base_model.model."  # of names in adapter files, whatever the model's own names begin with


def projection_weights(
    found: Mapping[str, Tensor], model: nn.Module, layer: SoftCoTLayer, adapter_name: str
) -> dict[str, Tensor]:
    """The projection's tensors among those of a file, checked.

    Returns:
        Weight `(H_base, H_assistant)` and bias `(H_base,)` under their names in the file.

    Raises:
        ValueError: One of them is missing, has another shape, is no floating-point tensor or not finite; or the file
            holds weights of the base that differ from those of this base.
    """
    path = unwrapped(path_of(model, layer)).removeprefix(_PREFIX)
    names = {f"{_PREFIX}{path}.{_OWN}{part}": part for part in _PARTS}
    names |= {name.removeprefix(_PREFIX): part for name, part in names.items()}
    own = {names[name]: tensor for name, tensor in found.items() if name in names}
    if len(own) < len(_PARTS):
        missing = next(part for part in _PARTS if part not in own)
        raise ValueError(
            f"The adapter's file must hold {path}.{_OWN}{missing}, but holds {sorted(found)[:4]}. Save the adapter "
            "again with `save_pretrained`, or load the base that it was trained on."
        )
    _check_rest({name: tensor for name, tensor in found.items() if name not in names}, model)
    assistant_size, base_size = layer.softcot_reader[adapter_name].assistant.hidden_size, layer.base_hidden_size
    shape = tuple(own["weight"].shape)
    if shape != (base_size, assistant_size) and len(shape) == 2:
        raise ValueError(misfit(shape[1], shape[0], assistant_size, base_size))
    for part, wanted in (("weight", (base_size, assistant_size)), ("bias", (base_size,))):
        tensor = own[part]
        if tuple(tensor.shape) != wanted or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(
                f"The adapter's {_OWN}{part} must hold finite floating-point numbers of the shape {wanted}, got "
                f"{tuple(tensor.shape)}, {tensor.dtype}"
                + ("" if not tensor.is_floating_point() or tensor.isfinite().all() else ", some not finite")
                + ". The file is broken or was written by a training run that diverged; load an earlier one."
            )
    return {name: tensor for name, tensor in found.items() if name in names}


def path_of(model: nn.Module, layer: SoftCoTLayer) -> str:
    """The name of the wrapped input embedding among a model's modules."""
    return next(name for name, module in model.named_modules() if module is layer)


def misfit(trained_assistant: object, trained_base: object, assistant_size: int, base_size: int) -> str:
    """The message for an adapter that was trained for other sizes."""
    return (
        f"The adapter's projection goes from assistant hidden size {trained_assistant} to base hidden size "
        f"{trained_base}, but this assistant has {assistant_size} and this base {base_size}. Load it with the pair it "
        "was trained for: the adapter's `base_model_name_or_path` and `assistant_model_name_or_path`."
    )


def _check_rest(rest: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse tensors beyond the projection, but for copies of what the base holds: PEFT saves resized embeddings."""
    if not rest:
        return
    state = {unwrapped(name): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in rest.items():
        bare = name.removeprefix(_PREFIX)
        present = next((state[key] for key in (name, bare, _PREFIX + bare) if key in state), None)
        if present is None or present.shape != tensor.shape or not torch.equal(tensor.to(present), present):
            raise ValueError(
                f"The adapter's file must hold its projection and nothing else, but {name!r} is "
                + ("unknown to this base." if present is None else "a weight of the base, and not this base's.")
                + " A SoftCoT adapter does not change its base. If the adapter is yours and its embeddings were "
                "resized, save the resized base, load it, and save the adapter with `save_embedding_layers=False`."
            )


def load_checked(
    layer: SoftCoTLayer,
    discard: Callable[[str], None],
    original: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Check what transformers' `load_adapter` is about to load into the base; other loading goes on as it is.

    Stands before `PreTrainedModel._load_pretrained_model`, which is private, and the only place between an adapter's
    injection and its weights (transformers 5.19 to 5.24). `discard` takes an adapter, by its name, off again.
    """
    model = kwargs.get("model", args[0] if args else None)
    files, state = kwargs.get("checkpoint_files"), kwargs.get("state_dict")
    name = _loading(layer, kwargs.get("expected_keys"))
    if name is None or not isinstance(model, nn.Module):
        return original(*args, **kwargs)
    try:
        weights = projection_weights(state or _read(files or []), model, layer, name)
        path = path_of(model, layer)  # a compiled backbone's names are not those of the file
        kwargs["state_dict"] = {f"{path}.{_OWN}{key.rpartition('.')[2]}": tensor for key, tensor in weights.items()}
        result = original(*args, **kwargs)
        unfilled = [key for key in result[0].missing_keys if f".{_OWN}{name}." in key]
        if unfilled:
            raise ValueError(f"The adapter's file must fill {unfilled}, but transformers loaded nothing into it.")
    except Exception:
        discard(name)
        raise
    layer.fresh.discard(name)
    return result


def _loading(layer: SoftCoTLayer, expected: list[str] | None) -> str | None:
    """The adapter whose weights are expected, when it was just injected; `None` for those of other methods."""
    for name in layer.fresh:
        if any(f".{_OWN}{name}." in key for key in expected or ()):
            return name
    return None


def _read(files: list[str]) -> dict[str, Tensor]:
    """The tensors of safetensors files."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(pickled(str(file)))
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    return tensors
