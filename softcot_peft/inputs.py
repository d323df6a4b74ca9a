"""The arguments of the base's forward, translated from the caller's columns to the placed ones.

Works on a dict of arguments by name, in place. Knows the names that transformers gives them, and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._compat import PACKED_NAMES, cache_length, counts_tokens
from .columns import insert, insert_positions
from .layer import write_thoughts
from .placement import IGNORED, Placement, check_unpacked, positions

_KINDS: dict[str, tuple[torch.dtype, ...]] = {  # what arguments may hold; nothing said: anything
    "input_ids": (torch.int64, torch.int32),
    "inputs_embeds": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "labels": (torch.int64,),
    "shift_labels": (torch.int64,),
    "position_ids": (torch.int64, torch.int32),
    "assistant_input_ids": (torch.int64, torch.int32),
    "assistant_attention_mask": (),
}
PER_TOKEN_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
OWN_NAMES = ("assistant_input_ids", "assistant_attention_mask")


def pop_own(inputs: dict[str, Any]) -> dict[str, Tensor | None]:
    """Take the caller's own assistant input, which the base does not know, out of the arguments."""
    return {name: inputs.pop(name, None) for name in OWN_NAMES}


def tokens(inputs: dict[str, Any]) -> Tensor:
    """The tensor that says how many rows and columns a pass has: ids `(B, L)` or embeddings `(B, L, H)`."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(inputs.get(name), Tensor):
            found: Tensor = inputs[name]
            return found
    raise ValueError(
        "`input_ids` must be given, got none. Pass the tokenized prompts; an empty text has none in a pipeline, and "
        "thoughts need a prompt before them."
    )


def check_adapter_names(names: list[str] | None) -> None:
    """Refuse a batch whose rows ask for adapters of their own."""
    if names is not None:
        raise ValueError(
            "`adapter_names` is not supported: a batch has one SoftCoT adapter. Call `set_adapter` and run the rows "
            "of each adapter as a batch of their own."
        )


def check(inputs: dict[str, Any], own: dict[str, Tensor | None]) -> None:
    """Refuse arguments of a forward, and the caller's `own` assistant input, that cannot carry thoughts."""
    check_adapter_names(inputs.get("adapter_names"))  # the bare base would take and ignore it
    given = {**inputs, **own}
    for name, kinds in _KINDS.items():
        value = given.get(name)
        if isinstance(value, Mapping):
            raise TypeError(
                f"`{name}` must be a tensor, got {type(value).__name__}. Unpack it: `model(**inputs)` or "
                "`generate(**inputs)`."
            )
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}. Pass the tokenizer's.")
        if value is not None and kinds and value.dtype not in kinds:
            raise TypeError(f"`{name}` must be a tensor of {kinds[0]}, got {value.dtype}. Convert it.")
        if value is not None and value.device.type == "meta":
            raise ValueError(f"`{name}` must hold values, got a tensor on the meta device. Move it to the base's.")
    keep = inputs.get("logits_to_keep")
    if (
        keep is not None
        and not isinstance(keep, int)
        and not (isinstance(keep, Tensor) and keep.dtype in (torch.int64, torch.int32) and keep.dim() == 1)
    ):
        raise TypeError(f"`logits_to_keep` must be an integer or a tensor of columns (K,), got {keep!r}.")
    embeds_only = inputs.get("input_ids") is None and inputs.get("inputs_embeds") is not None
    if embeds_only and own["assistant_input_ids"] is None:
        raise ValueError(
            "`inputs_embeds` alone do not tell the assistant the prompt. Pass `input_ids` instead, or "
            "`assistant_input_ids` (and `assistant_attention_mask`), ending in the thought positions, as well."
        )
    if own["assistant_attention_mask"] is not None and own["assistant_input_ids"] is None:
        raise ValueError(
            "`assistant_attention_mask` is the mask of `assistant_input_ids`, which were not given. Pass both or "
            "neither."
        )
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if isinstance(embeds, Tensor) and embeds.dim() != 3:
        raise ValueError(f"`inputs_embeds` must have the shape (batch, tokens, width), got {tuple(embeds.shape)}.")
    if isinstance(ids, Tensor) and ids.dim() != 2:
        raise ValueError(f"`input_ids` must have the shape (batch, tokens), got {tuple(ids.shape)}. Add the batch.")
    packed = [name for name in PACKED_NAMES if inputs.get(name) is not None]
    if packed:
        raise ValueError(
            f"`{packed[0]}` announces a packed or padding-free batch, which cannot carry thoughts, since a row has "
            "one place for them. Turn `packing`, `padding_free` and continuous batching off."
        )
    mask = inputs.get("attention_mask")
    if mask is not None and not is_padding_mask(mask):
        found = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"`attention_mask` must be the padding mask (batch, tokens), got {found}: thoughts cannot be placed under "
            "a ready-made mask. Pass the tokenizer's mask."
        )
    for name in ("attention_mask", "labels", "shift_labels"):
        value, expected = inputs.get(name), tokens(inputs).shape[:2]
        if value is not None and value.shape != expected:
            raise ValueError(
                f"`{name}` must have the shape of the tokens, {tuple(expected)}, got {tuple(value.shape)}. Make one "
                "value per token."
            )
    if tokens(inputs).shape[0] == 0:
        raise ValueError("`input_ids` must hold at least one row, got none.")
    if tokens(inputs).shape[1] == 0:
        raise ValueError("`input_ids` must hold a prompt, got no tokens. Thoughts need a prompt before them.")
    if isinstance(mask, Tensor) and mask.device.type == "meta":
        raise ValueError("`attention_mask` must hold values, got one on the meta device. Move it to the base's.")
    places = inputs.get("position_ids")
    rows, columns = tokens(inputs).shape[:2]
    if places is not None and (places.dim() < 2 or places.shape[-1] != columns or places.shape[-2] not in (1, rows)):
        raise ValueError(
            f"`position_ids` must have the shape of the tokens, {(rows, columns)}, got {tuple(places.shape)}. Make "
            "one position per token, or leave them out."
        )
    check_unpacked(places, mask)


def is_padding_mask(mask: Any) -> bool:
    """Whether a mask has the form `(B, L)`."""
    return isinstance(mask, Tensor) and mask.dim() == 2


def place(
    inputs: dict[str, Any], placement: Placement, thoughts: Tensor | None, filler: int, seen: int = 0
) -> tuple[Tensor | None, bool]:
    """Make room for the thoughts in every per-token argument; into embeddings they are written here.

    Args:
        inputs: The forward's arguments.
        placement: Where the thoughts stand in the rows.
        thoughts: `(B, N, H_base)`, for `inputs_embeds`; `None` where the embedding layer makes and writes them.
        filler: Id under inserted thought positions.
        seen: Columns of the rows that earlier passes have read (chunked prefill).

    Returns:
        The columns whose logits the caller asked for, when each was translated into both of its possible rows, and
        whether the caller asked for the last rows alone, which stay the last.

    Raises:
        ValueError: A per-token argument whose value at a thought position is not known.
    """
    batch, length = tokens(inputs).shape[:2]
    here = placement.after(seen)
    if not placement.inserted:
        if thoughts is not None:
            inputs["inputs_embeds"] = write_thoughts(inputs["inputs_embeds"], thoughts, here.start)
        return None, False
    kept = _keep_logits(inputs, here, length)
    mask = inputs.pop("attention_mask", None)
    start, num, column = here.start, here.num_thoughts, here.column
    fills = {"input_ids": filler, "labels": IGNORED}
    for name, value in list(inputs.items()):
        if not isinstance(value, Tensor) or value.dim() < 2:
            continue
        if name == "position_ids":
            inputs[name] = insert_positions(value, start, num)
        elif name == "inputs_embeds" and thoughts is not None:
            inputs[name] = insert(value, start, num, thoughts.to(value), column)
        elif name == "shift_labels":  # already shifted: the last thought's row predicts the first label
            inputs[name] = insert(value, start - 1, num, IGNORED, None if column is None else column - 1)
        elif name in fills or name.endswith("token_type_ids"):
            inputs[name] = insert(value, start, num, fills.get(name, 0), column)
        elif value.shape[:2] == (batch, length):
            raise ValueError(
                f"`{name}` has one value per token, and its value at a thought position is not known. Leave it out, "
                "or write a run of `thought_token` into the prompts, so that every position is yours."
            )
    if mask is not None:
        inputs["attention_mask"] = _placed_mask(mask, placement, seen + length)
    return kept


def drop_early_labels(inputs: dict[str, Any], placement: Placement) -> None:
    """Leave labels before the thoughts out of the loss: the tokens there are not predicted with them."""
    for name, first in (("labels", 0), ("shift_labels", 1)):  # the last thought's row predicts the first label
        if isinstance(inputs.get(name), Tensor):
            columns = torch.arange(first, inputs[name].shape[1] + first, device=inputs[name].device)
            early = columns < placement.start.to(columns.device)[:, None]
            inputs[name] = inputs[name].masked_fill(early, IGNORED)


def move_up(inputs: dict[str, Any], placement: Placement, cache: Any, takes_positions: bool) -> None:
    """Move mask and positions of the next tokens up, after a cache that holds the thoughts."""
    length = tokens(inputs).shape[1]
    mask = inputs.get("attention_mask")
    if placement.inserted:
        num = placement.num_thoughts
        # Ready-made masks know the caller's columns only. A model whose cache does not count has read the padding, and
        # needs no mask any more where `generate` gives it none.
        if mask is not None or (placement.padded and counts_tokens(cache)):
            so_far = 0 if is_padding_mask(mask) else cache_length(cache) - num + length
            inputs["attention_mask"] = mask = _placed_mask(mask, placement, so_far)
        if isinstance(inputs.get("position_ids"), Tensor):
            inputs["position_ids"] = inputs["position_ids"] + num
    if placement.padded and takes_positions and inputs.get("position_ids") is None and is_padding_mask(mask):
        inputs["position_ids"] = positions(inputs["attention_mask"])[:, -length:]


def _keep_logits(inputs: dict[str, Any], placement: Placement, length: int) -> tuple[Tensor | None, bool]:
    """Translate `logits_to_keep`; returns what `place` returns."""
    keep = inputs.get("logits_to_keep")
    if keep is None or (isinstance(keep, int) and keep == 0):
        return None, False
    if isinstance(keep, int):
        if 0 < keep <= length - placement.latest + 1:  # every row asked for moves up by N
            return None, True
        keep = torch.arange(length, device=placement.start.device)[-keep:]
    keep = torch.where(keep < 0, keep + length, keep)
    # A token's row is its own before the thoughts and N further after them; rows differ, so both are computed.
    inputs["logits_to_keep"] = torch.cat([keep, keep + placement.num_thoughts])
    return keep, False


def _placed_mask(mask: Any, placement: Placement, length: int) -> Tensor:
    """The mask `(B, length + N)` that the base sees.

    Anything but a padding mask, such as the ready-made masks that `generate` computes for caches of a fixed size, is
    replaced by the prompts' mask followed by attended tokens.
    """
    if not is_padding_mask(mask):
        start, mask = placement.start, placement.attention_mask
        if mask is None:
            mask = torch.ones(len(start), 0, dtype=torch.long, device=start.device)
        mask = torch.cat([mask, mask.new_ones(len(start), length - mask.shape[1])], dim=1)
    return insert(mask, placement.start, placement.num_thoughts, 1, placement.column)
