"""Rejects arguments of a forward that cannot be combined with thoughts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..compat.releases import PACKED_NAMES
from .arguments import is_padding_mask, tokens

_DTYPES: dict[str, tuple[torch.dtype, ...]] = {  # the dtypes an argument may have; empty: any
    "input_ids": (torch.int64, torch.int32),
    "inputs_embeds": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "labels": (torch.int64,),
    "shift_labels": (torch.int64,),
    "position_ids": (torch.int64, torch.int32),
    "assistant_input_ids": (torch.int64, torch.int32),
    "assistant_attention_mask": (),
}


def check_arguments(inputs: dict[str, Any], own: dict[str, Tensor | None]) -> None:
    """Check the arguments of a forward, and the caller's `own` input for the assistant.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, is missing, or belongs to a packed batch.
    """
    check_adapter_names(inputs.get("adapter_names"))  # a bare base would accept and ignore it
    _check_types({**inputs, **own})
    _check_logits_to_keep(inputs.get("logits_to_keep"))
    _check_prompts(inputs, own)
    _check_unpacked_names(inputs)
    _check_shapes(inputs)
    check_unpacked(inputs.get("position_ids"), inputs.get("attention_mask"))


def check_adapter_names(names: list[str] | None) -> None:
    """Reject a different adapter per row."""
    if names is not None:
        raise ValueError(
            "`adapter_names` is not supported: a batch has one SoftCoT adapter. Call `set_adapter` and run the rows "
            "of each adapter as a separate batch."
        )


def _check_types(arguments: Mapping[str, Any]) -> None:
    for name, dtypes in _DTYPES.items():
        value = arguments.get(name)
        if isinstance(value, Mapping):
            raise TypeError(
                f"`{name}` must be a tensor, got {type(value).__name__}. Unpack it: `model(**inputs)` or "
                "`generate(**inputs)`."
            )
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}. Pass the tokenizer's.")
        if value is not None and dtypes and value.dtype not in dtypes:
            raise TypeError(f"`{name}` must be a tensor of {dtypes[0]}, got {value.dtype}. Convert it.")
        if value is not None and value.device.type == "meta":
            raise ValueError(f"`{name}` must hold values, got a tensor on the meta device. Move it to the base's.")


def _check_logits_to_keep(keep: Any) -> None:
    if keep is None or isinstance(keep, int):
        return
    if not (isinstance(keep, Tensor) and keep.dtype in (torch.int64, torch.int32) and keep.dim() == 1):
        raise TypeError(f"`logits_to_keep` must be an integer or a tensor of columns (K,), got {keep!r}.")


def _check_prompts(inputs: dict[str, Any], own: dict[str, Tensor | None]) -> None:
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if ids is None and embeds is not None and own["assistant_input_ids"] is None:
        raise ValueError(
            "`inputs_embeds` alone do not tell the assistant the prompt. Pass `input_ids` instead, or "
            "`assistant_input_ids` (and `assistant_attention_mask`), ending in the thought positions, as well."
        )
    if own["assistant_attention_mask"] is not None and own["assistant_input_ids"] is None:
        raise ValueError(
            "`assistant_attention_mask` is the mask of `assistant_input_ids`, which were not given. Pass both or "
            "neither."
        )
    if isinstance(embeds, Tensor) and embeds.dim() != 3:
        raise ValueError(f"`inputs_embeds` must have the shape (batch, tokens, width), got {tuple(embeds.shape)}.")
    if isinstance(ids, Tensor) and ids.dim() != 2:
        raise ValueError(f"`input_ids` must have the shape (batch, tokens), got {tuple(ids.shape)}. Add the batch.")


def _check_unpacked_names(inputs: dict[str, Any]) -> None:
    for name in PACKED_NAMES:
        if inputs.get(name) is not None:
            raise ValueError(
                f"`{name}` announces a packed or padding-free batch, which cannot carry thoughts, since a row has "
                "only one place for them. Turn `packing`, `padding_free` and continuous batching off."
            )


def _check_shapes(inputs: dict[str, Any]) -> None:
    mask = inputs.get("attention_mask")
    if mask is not None and not is_padding_mask(mask):
        found = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"`attention_mask` must be the padding mask (batch, tokens), got {found}: thoughts cannot be placed under "
            "a ready-made mask. Pass the tokenizer's mask."
        )
    rows, columns = tokens(inputs).shape[:2]
    for name in ("attention_mask", "labels", "shift_labels"):
        value = inputs.get(name)
        if value is not None and value.shape != (rows, columns):
            raise ValueError(
                f"`{name}` must have the shape of the tokens, {(rows, columns)}, got {tuple(value.shape)}. Make one "
                "value per token."
            )
    if rows == 0:
        raise ValueError("`input_ids` must hold at least one row, got none.")
    if columns == 0:
        raise ValueError("`input_ids` must hold a prompt, got no tokens. Thoughts need a prompt before them.")
    if isinstance(mask, Tensor) and mask.device.type == "meta":
        raise ValueError("`attention_mask` must hold values, got one on the meta device. Move it to the base's.")
    position_ids = inputs.get("position_ids")
    if position_ids is not None and (
        position_ids.dim() < 2 or position_ids.shape[-1] != columns or position_ids.shape[-2] not in (1, rows)
    ):
        raise ValueError(
            f"`position_ids` must have the shape of the tokens, {(rows, columns)}, got {tuple(position_ids.shape)}. "
            "Make one position per token, or leave them out."
        )


def check_unpacked(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Reject packed rows, whose position ids `(..., L)` restart among attended tokens."""
    if position_ids is None or position_ids.shape[-1] < 2:
        return
    restarts = position_ids[..., 1:] < position_ids[..., :-1]
    if attention_mask is not None:
        restarts = restarts & (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
    if restarts.any():
        row, column = (int(index) for index in restarts.flatten(0, -2).nonzero()[0])
        raise ValueError(
            f"`position_ids` must rise along each row, but they start again within row {row}, in column {column + 1}: "
            "packed or padding-free batches cannot carry thoughts, since a row has only one place for them. Turn "
            "`packing` and `padding_free` off."
        )
