"""Reads one weight of a model from its safetensors files, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .untrusted import check_shards


def read_weight(name: str, revision: str | None, key: str, shape: torch.Size, device: torch.device) -> Tensor:
    """Read a weight. Of a sharded model on the Hub, only the file that holds it is downloaded.

    Files may name a weight differently from the model: without the name of the backbone, or within a larger model.
    Then its name's last part counts, if it is there once.

    Args:
        name: Hub id or folder of the model.
        revision: Its revision on the Hub.
        key: Name of the weight in the model.
        shape: Its shape in the model.
        device: Device to read it to.

    Raises:
        ValueError: The model has no safetensors files, they have no such weight, or it has another shape.
    """
    file, keys = _find(name, revision)
    tail = ".".join(key.split(".")[-2:])
    found = [key] if key in keys else [other for other in keys if other == tail or other.endswith(f".{tail}")]
    if len(found) != 1:
        raise ValueError(
            f"The weights of {name!r} must hold {key!r}, or one other name that ends in {tail!r}, but hold "
            f"{sorted(found) or sorted(keys)[:4]}. Save the model again with `save_pretrained`."
        )
    path = cached_file(name, keys[found[0]], revision=revision) if file is None else file
    with safe_open(path, framework="pt", device=str(device)) as opened:
        weight: Tensor = opened.get_tensor(found[0])
    if weight.shape != shape or not weight.is_floating_point():
        raise ValueError(
            f"{found[0]!r} in the weights of {name!r} must have the shape {tuple(shape)} of its config and hold "
            f"floating-point numbers, got {tuple(weight.shape)}, {weight.dtype}. Packed weights cannot be read by "
            "themselves; load the whole base and call `prompt_embeds` with it."
        )
    return weight


def _find(name: str, revision: str | None) -> tuple[str | None, dict[str, str]]:
    """Return the path of a single file, or `None`, and the name of the file that holds each weight."""
    path = _optional(name, revision, SAFE_WEIGHTS_NAME)
    if path is not None:
        with safe_open(path, framework="pt") as opened:
            return path, dict.fromkeys(opened.keys(), SAFE_WEIGHTS_NAME)
    index = _optional(name, revision, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise ValueError(
            f"The base's weights must be safetensors for its embedding matrix to be read by itself, but {name!r} has "
            f"neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. Load the base and save it with "
            "`save_pretrained`, or call `prompt_embeds` with the loaded base."
        )
    check_shards(name, revision)
    return None, json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]


def _optional(name: str, revision: str | None, file: str) -> str | None:
    """Return the path of a file, which is downloaded if needed; `None` if the model has none of this name."""
    try:
        return cached_file(name, file, revision=revision)
    except OSError:
        return None
