"""Checks the tensors of an adapter file before they are loaded: only those of its source are allowed.

Adapter files are untrusted. PEFT and transformers load every tensor whose name exists in the model, so that a file
could overwrite weights of the base. In a file, the name of a source's tensor consists of the name of the base's input
embedding, `softcot_` and its own name: `base_model.model.model.embed_tokens.softcot_projection.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..compat.engines import unwrapped
from .untrusted import pickle_message

OWN = "softcot_"  # prefix of the names of a source's children, in models and in files
_PREFIX = "base_model.model."  # of all names in adapter files


class _Source(Protocol):
    """The methods of a thought source that this module uses."""

    def checkpoint_tensors(self) -> dict[str, torch.Size]: ...

    def check_checkpoint(self, tensors: Mapping[str, Tensor]) -> None: ...


def name_in_model(name: str, adapter_name: str) -> str:
    """Return the name of a source's tensor within the wrapped embedding.

    >>> name_in_model("projection.weight", "default")
    'softcot_projection.default.weight'
    """
    child, _, rest = name.partition(".")
    return f"{OWN}{child}.{adapter_name}.{rest}"


def without_adapter_name(key: str, adapter_name: str) -> str:
    """Return the name in a file of one of the model's tensors.

    >>> without_adapter_name("base_model.model.embed_tokens.softcot_projection.default.weight", "default")
    'base_model.model.embed_tokens.softcot_projection.weight'
    """
    path, found, name = unwrapped(key).rpartition(f".{OWN}")
    child, _, rest = name.partition(f".{adapter_name}.")
    return f"{path}{found}{child}.{rest}" if rest else key


def names_in_file(path: str, source: _Source) -> dict[str, str]:
    """Map the names that a source's tensors may have in a file, with and without PEFT's prefix, to their own names.

    Args:
        path: Name of the wrapped embedding among the model's modules.
        source: The source.
    """
    path = unwrapped(path).removeprefix(_PREFIX)
    names = {f"{path}.{OWN}{name}": name for name in source.checkpoint_tensors()}
    return names | {f"{_PREFIX}{key}": name for key, name in names.items()}


def check_tensors(found: Mapping[str, Tensor], model: nn.Module, path: str, source: _Source) -> dict[str, Tensor]:
    """Check the tensors of a file, and return those of the source.

    Args:
        found: The file's tensors.
        model: The model to load them into.
        path: Name of the wrapped embedding among its modules.
        source: The adapter's source.

    Returns:
        The source's tensors under their names in the file.

    Raises:
        ValueError: A tensor is missing, has another shape, is not a floating-point tensor or is not finite; or the
            file holds other tensors that are not copies of the base's weights.
    """
    names, wanted = names_in_file(path, source), source.checkpoint_tensors()
    checked = {key: tensor for key, tensor in found.items() if key in names}
    own = {names[key]: tensor for key, tensor in checked.items()}
    for name in wanted:
        if name not in own:
            where = f"{unwrapped(path).removeprefix(_PREFIX)}.{OWN}{name}"
            raise ValueError(
                f"The adapter's file must hold {where}, but holds {sorted(found)[:4]}. Save the adapter again with "
                "`save_pretrained`, or load the base that it was trained on."
            )
    _check_rest({key: tensor for key, tensor in found.items() if key not in names}, model)
    source.check_checkpoint(own)
    for name, shape in wanted.items():
        _check_values(name, own[name], shape)
    return checked


def _check_values(name: str, tensor: Tensor, shape: torch.Size) -> None:
    real = tensor.is_floating_point()
    if tensor.shape == shape and real and tensor.isfinite().all():
        return
    infinite = ", some not finite" if real and not tensor.isfinite().all() else ""
    raise ValueError(
        f"The adapter's {OWN}{name} must hold finite floating-point numbers of the shape {tuple(shape)}, got "
        f"{tuple(tensor.shape)}, {tensor.dtype}{infinite}. The file is broken or was written by a training run that "
        "diverged; load an earlier one."
    )


def _check_rest(rest: Mapping[str, Tensor], model: nn.Module) -> None:
    """Reject tensors that are not the source's, except copies of the base's: PEFT saves resized embeddings."""
    if not rest:
        return
    state = {unwrapped(name): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in rest.items():
        bare = name.removeprefix(_PREFIX)
        present = next((state[key] for key in (name, bare, _PREFIX + bare) if key in state), None)
        if present is None or present.shape != tensor.shape or not _same_values(tensor, present):
            raise ValueError(
                f"The adapter's file must hold its projection and nothing else, but {name!r} is "
                + ("unknown to this base." if present is None else "a weight of the base, and not this base's.")
                + " A SoftCoT adapter does not change its base. If the adapter is yours and its embeddings were "
                "resized, save the resized base, load it, and save the adapter with `save_embedding_layers=False`."
            )


def _same_values(tensor: Tensor, present: Tensor) -> bool:
    """Whether a tensor is a copy of the base's, which is unknown on the meta device. Neither is ever loaded."""
    return present.is_meta or torch.equal(tensor.to(present), present)


def read_safetensors(files: list[str]) -> dict[str, Tensor]:
    """Read the tensors of safetensors files.

    Raises:
        ValueError: A file is a pickle.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(pickle_message(str(file)))
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
    return tensors
