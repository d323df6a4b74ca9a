"""Translates the arguments of a forward from the caller's columns to the placed columns.

The functions modify a dict of arguments by name, in place. They know the argument names of transformers, but no model.
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
OWN_NAMES = ("assistant_input_ids", "assistant_attention_mask", "chains")


def pop_own(inputs: dict[str, Any]) -> dict[str, Any]:
    """Pop the arguments for the thought source, which the base does not accept."""
    return {name: inputs.pop(name, None) for name in OWN_NAMES}


def tokens(inputs: dict[str, Any]) -> Tensor:
    """Return the ids `(B, L)` or embeddings `(B, L, H)` of a pass, whose shape gives its rows and columns."""
    found = _find_tokens(inputs)
    if found is None:
        raise ValueError(
            "`input_ids` must be given, got none. Pass the tokenized prompts; an empty text has none in a pipeline, "
            "and thoughts need a prompt before them."
        )
    return found


def _find_tokens(inputs: dict[str, Any]) -> Tensor | None:
    given = (inputs.get(name) for name in ("input_ids", "inputs_embeds"))
    return next((values for values in given if isinstance(values, Tensor)), None)


def is_padding_mask(mask: Any) -> bool:
    """Return whether a mask has the shape `(B, L)`."""
    return isinstance(mask, Tensor) and mask.dim() == 2


def insert_thoughts(
    inputs: dict[str, Any], placement: Placement, thoughts: Tensor | None, filler: int, seen: int = 0
) -> tuple[Tensor | None, bool]:
    """Insert thought positions into all per-token arguments, and write the thoughts into `inputs_embeds`.

    Args:
        inputs: Arguments of the forward.
        placement: The thought positions.
        thoughts: `(B, N, H_base)`, for `inputs_embeds`; `None`: the wrapped embedding writes them.
        filler: Id at inserted thought positions.
        seen: Number of columns that earlier passes have processed (chunked prefill).

    Returns:
        The caller's columns in `logits_to_keep`, if each was translated to the two placed columns it can have; and
        whether only the last columns were requested, which need no translation.

    Raises:
        ValueError: A per-token argument has no known value at a thought position.
    """
    batch, length = tokens(inputs).shape[:2]
    here = placement.after(seen)
    if not placement.inserted:
        if thoughts is not None:
            inputs["inputs_embeds"] = write_thoughts(inputs["inputs_embeds"], thoughts, here.start)
        keep_columns(inputs)
        return None, False
    requested = _translate_logits_to_keep(inputs, here, length)
    mask = inputs.pop("attention_mask", None)
    start, num, column = here.start, here.num_thoughts, here.column
    fills = {"input_ids": filler, "labels": IGNORED}
    for name, value in list(inputs.items()):
        if not isinstance(value, Tensor) or value.dim() < 2:
            continue
        if name == "position_ids":
            inputs[name] = insert_positions(value, start, num, (placement.before - seen).clamp(min=0))
        elif name == "inputs_embeds" and thoughts is not None:
            inputs[name] = insert(value, start, num, thoughts.to(value), column)
        elif name == "shift_labels":  # already shifted: the last thought predicts the first label
            inputs[name] = insert(value, start - 1, num, IGNORED, None if column is None else column - 1)
        elif name in fills or name.endswith("token_type_ids"):
            inputs[name] = insert(value, start, num, fills.get(name, 0), column)
        elif value.shape[:2] == (batch, length):
            raise ValueError(
                f"`{name}` has one value per token, and its value at a thought position is not known. Leave it out, "
                "or write a run of `thought_token` into the prompts and pass a value for each position."
            )
    if mask is not None:
        inputs["attention_mask"] = _placed_mask(mask, placement, seen + length)
    return requested


def repeat_for_chains(inputs: dict[str, Any], placement: Placement, chains: int) -> Placement:
    """Repeat each row of all arguments for its chains, which are adjacent; returns the rows' placement."""
    rows = len(placement.start)
    if chains == 1:
        return placement
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.dim() < 2:
            continue
        axis = value.dim() - 2 if name == "position_ids" else 0  # may have leading axes, and one row for all
        if value.shape[axis] == rows:
            inputs[name] = value.repeat_interleave(chains, dim=axis)
    if inputs.get("num_items_in_batch") is not None:  # the mean over chains, not their sum
        inputs["num_items_in_batch"] = inputs["num_items_in_batch"] * chains
    return placement.expand(rows * chains)


def drop_early_labels(inputs: dict[str, Any], placement: Placement) -> None:
    """Exclude labels before the thoughts from the loss, because those tokens are predicted without thoughts.

    `Trainer` divides the loss by its own count of labels, in which they are. The divisor is reduced by their share of
    this batch; it counts all batches of an accumulated step.
    """
    share: Tensor | None = None
    for name, first in (("labels", 0), ("shift_labels", 1)):  # the last thought predicts the first label
        labels = inputs.get(name)
        if isinstance(labels, Tensor):
            columns = torch.arange(first, labels.shape[1] + first, device=labels.device)
            early = columns < placement.start.to(columns.device)[:, None]
            inputs[name] = labels.masked_fill(early, IGNORED)
            kept, counted = ((each[:, 1 - first :] != IGNORED).sum().clamp(min=1) for each in (inputs[name], labels))
            share = kept / counted
    number = inputs.get("num_items_in_batch")
    if number is not None and share is not None:
        inputs["num_items_in_batch"] = number * (share.to(number.device) if isinstance(number, Tensor) else share)


def shift_positions(inputs: dict[str, Any], placement: Placement, cache: Any, takes_positions: bool) -> None:
    """Shift the mask and positions of the next tokens by the number of thoughts in the cache."""
    length = tokens(inputs).shape[1]
    mask = inputs.get("attention_mask")
    if placement.inserted:
        num = placement.num_thoughts
        # Ready-made masks cover the caller's columns only. A model whose cache does not count tokens has processed the
        # padding, and needs no mask if `generate` passes none.
        if mask is not None or (placement.padded and counts_tokens(cache)):
            so_far = 0 if is_padding_mask(mask) else cache_length(cache) - num + length
            inputs["attention_mask"] = mask = _placed_mask(mask, placement, so_far)
        if isinstance(inputs.get("position_ids"), Tensor):
            inputs["position_ids"] = inputs["position_ids"] + num
    if placement.padded and takes_positions and inputs.get("position_ids") is None and is_padding_mask(mask):
        inputs["position_ids"] = positions(inputs["attention_mask"])[:, -length:]


def keep_columns(inputs: dict[str, Any], inserted: int = 0) -> None:
    """Replace a number in `logits_to_keep` by its columns on the CPU, for the same logits in less time.

    The states that a number keeps are a slice, which is not contiguous. PyTorch (2.6 to 2.13) multiplies it with a
    frozen head row by row, and on CPUs copies the head for each row: 8 s for 16 rows and a head of 136 M parameters
    in bfloat16, instead of 0.03 s. On other devices the number stays, since states may be on another one than the ids.

    Args:
        inputs: Arguments of a forward; the states of a single column are contiguous and need no change.
        inserted: Number of thought positions that will be inserted into the columns.
    """
    keep, given = inputs.get("logits_to_keep"), _find_tokens(inputs)
    if not isinstance(keep, int) or given is None or given.dim() == 1 or given.device.type != "cpu":
        return
    if 0 < keep < given.shape[1] + inserted:
        inputs["logits_to_keep"] = torch.arange(-keep, 0)  # from the end: prompts may be cut off later


def unshift(shift_labels: Tensor) -> Tensor:
    """Align labels `(B, L)` that are shifted one to the left with the ids; the first token has no label."""
    return torch.cat([torch.full_like(shift_labels[:, :1], IGNORED), shift_labels[:, :-1]], dim=1)


def _translate_logits_to_keep(inputs: dict[str, Any], placement: Placement, length: int) -> tuple[Tensor | None, bool]:
    """Translate `logits_to_keep`; see `insert_thoughts` for the return values."""
    keep = inputs.get("logits_to_keep")
    if keep is None or (isinstance(keep, int) and keep == 0):
        return None, False
    if isinstance(keep, int):
        if 0 < keep <= length - placement.latest + 1:  # all requested columns shift by N
            keep_columns(inputs, placement.num_thoughts)
            return None, True
        keep = torch.arange(length, device=placement.start.device)[-keep:]
    keep = torch.where(keep < 0, keep + length, keep)
    # A column shifts by N only after the thoughts, which is different in each row: request the logits of both columns.
    inputs["logits_to_keep"] = torch.cat([keep, keep + placement.num_thoughts])
    return keep, False


def _placed_mask(mask: Any, placement: Placement, length: int) -> Tensor:
    """Return the mask `(B, length + N)` for the base.

    Masks other than padding masks, such as those that `generate` computes for static caches, are replaced by the
    prompts' padding mask, extended with ones.
    """
    if not is_padding_mask(mask):
        start, mask = placement.start, placement.attention_mask
        if mask is None:
            mask = torch.ones(len(start), 0, dtype=torch.long, device=start.device)
        mask = torch.cat([mask, mask.new_ones(len(start), length - mask.shape[1])], dim=1)
    return insert(mask, placement.start, placement.num_thoughts, 1, placement.column)
