"""Checks the tensors that transformers' `load_adapter` loads into a base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from .attached import discard_injected, path_of
from .checkpoint.weights import check_tensors, name_in_model, names_in_file, read_safetensors
from .embedding import SoftCoTLayer


def load_checked(layer: SoftCoTLayer, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Check and load the tensors of a SoftCoT adapter; load anything else unchanged.

    Wraps `PreTrainedModel._load_pretrained_model`, which is private but the only method called between injecting an
    adapter and loading its weights (transformers 5.19 to 5.24). An adapter that fails to load is removed.
    """
    model = kwargs.get("model", args[0] if args else None)
    name = _injected_adapter(layer, kwargs.get("expected_keys"))
    if name is None or not isinstance(model, PreTrainedModel):
        return original(*args, **kwargs)
    try:
        loaded = kwargs.get("state_dict") or read_safetensors(kwargs.get("checkpoint_files") or [])
        path, source = path_of(model, layer), layer.source(name)  # a compiled backbone has another path than the file
        checked, names = check_tensors(loaded, model, path, source), names_in_file(path, source)
        state = {f"{path}.{name_in_model(names[key], name)}": tensor for key, tensor in checked.items()}
        result = original(*args, **kwargs | {"state_dict": state})
        if unfilled := [key for key in result[0].missing_keys if key in state]:
            raise ValueError(f"The adapter's file must fill {unfilled}, but transformers loaded nothing into it.")
    except Exception:
        discard_injected(model, name)
        raise
    layer.fresh.discard(name)
    return result


def _injected_adapter(layer: SoftCoTLayer, expected: list[str] | None) -> str | None:
    """Return the just injected adapter that the expected keys belong to; `None` for adapters of other methods."""
    for name in layer.fresh:
        own = tuple(name_in_model(key, name) for key in layer.source(name).checkpoint_tensors())
        if any(key.endswith(own) for key in expected or ()):
            return name
    return None
