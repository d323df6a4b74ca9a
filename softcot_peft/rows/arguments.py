"""Translates the arguments of a forward from the caller's columns to the placed ones.

Works in place on a dict of arguments by name. Knows the names that transformers gives them, and no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compat.caches import cache_length, counts_tokens
from .columns import insert, insert_positions, write_thoughts
from .facts import IGNORED
from .placement import Placement, positions

PER_TOKEN_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
OWN_NAMES = ("assistant_input_ids", "assistant_attention_mask")


def pop_own(inputs: dict[str, Any]) -> dict[str, Tensor | None]:
    """Take the caller's own assistant input, which the base does not know, out of the arguments."""
    return {name: inputs.pop(name, None) for name in OWN_NAMES}


def tokens(inputs: dict[str, Any]) -> Tensor:
    """The ids `(B, L)` or embeddings `(B, L, H)` of a pass, whose shape says how many rows and columns it has."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(inputs.get(name), Tensor):
            found: Tensor = inputs[name]
            return found
    raise ValueError(
        "`input_ids` must be given, got none. Pass the tokenized prompts; an empty text has none in a pipeline, and "
        "thoughts need a prompt before them."
    )


def is_padding_mask(mask: Any) -> bool:
    """Whether a mask has the form `(B, L)`."""
    return isinstance(mask, Tensor) and mask.dim() == 2


def insert_thoughts(
    inputs: dict[str, Any], placement: Placement, thoughts: Tensor | None, filler: int, seen: int = 0
) -> tuple[Tensor | None, bool]:
    """Make room for the thoughts in every per-token argument, and write them into embeddings.

    Args:
        inputs: The forward's arguments.
        placement: Where the thoughts stand in the rows.
        thoughts: `(B, N, H_base)`, for `inputs_embeds`; `None`: the wrapped embedding writes them.
        filler: Id at inserted thought positions.
        seen: Columns of the rows that earlier passes have read (chunked prefill).

    Returns:
        The columns whose logits the caller asked for, if each was translated into both of its possible rows; and
        whether the caller asked for the last rows alone, which stay the last.

    Raises:
        ValueError: A per-token argument has no known value at a thought position.
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
    """Exclude labels before the thoughts from the loss: tokens there are predicted without thoughts."""
    for name, first in (("labels", 0), ("shift_labels", 1)):  # the last thought's row predicts the first label
        if isinstance(inputs.get(name), Tensor):
            columns = torch.arange(first, inputs[name].shape[1] + first, device=inputs[name].device)
            early = columns < placement.start.to(columns.device)[:, None]
            inputs[name] = inputs[name].masked_fill(early, IGNORED)


def shift_positions(inputs: dict[str, Any], placement: Placement, cache: Any, takes_positions: bool) -> None:
    """Shift mask and positions of the next tokens by the thoughts that the cache holds."""
    length = tokens(inputs).shape[1]
    mask = inputs.get("attention_mask")
    if placement.inserted:
        num = placement.num_thoughts
        # Ready-made masks know the caller's columns only. A model whose cache does not count has read the padding, and
        # needs no mask where `generate` gives it none.
        if mask is not None or (placement.padded and counts_tokens(cache)):
            so_far = 0 if is_padding_mask(mask) else cache_length(cache) - num + length
            inputs["attention_mask"] = mask = _placed_mask(mask, placement, so_far)
        if isinstance(inputs.get("position_ids"), Tensor):
            inputs["position_ids"] = inputs["position_ids"] + num
    if placement.padded and takes_positions and inputs.get("position_ids") is None and is_padding_mask(mask):
        inputs["position_ids"] = positions(inputs["attention_mask"])[:, -length:]


def unshift(shift_labels: Tensor) -> Tensor:
    """Labels `(B, L)` in line with the ids, from labels shifted one to the left; the first one is not predicted."""
    return torch.cat([torch.full_like(shift_labels[:, :1], IGNORED), shift_labels[:, :-1]], dim=1)


def _keep_logits(inputs: dict[str, Any], placement: Placement, length: int) -> tuple[Tensor | None, bool]:
    """Translate `logits_to_keep`; returns what `insert_thoughts` returns."""
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
