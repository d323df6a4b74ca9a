"""Inserts columns into the rows of a batch and removes them again, as pure tensor functions.

There are two coordinate systems. The *caller's* columns are the L tokens that the caller passes. The *placed* columns
are what the base sees: the same tokens with N thought positions before column `start`, which may differ by row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


def insert(values: Tensor, start: Tensor, num: int, fill: int | Tensor, column: int | None = None) -> Tensor:
    """Insert columns into every row.

    Args:
        values: `(B, L)` or `(B, L, H)`.
        start: First inserted column of each row, `(B,)`.
        num: Number of inserted columns.
        fill: Their values: a number, or `(B, num, H)`.
        column: `start` as a number, if it is known to be the same for all rows.

    Returns:
        `(B, L + num)` or `(B, L + num, H)`.
    """
    if column is not None:
        new = fill if isinstance(fill, Tensor) else values.new_full((values.shape[0], num, *values.shape[2:]), fill)
        return torch.cat([values[:, :column], new, values[:, column:]], dim=1)
    columns = torch.arange(values.shape[1] + num, device=values.device)
    offset = columns - start.to(values.device)[:, None]  # (B, L + num)
    source = torch.where(offset >= num, columns - num, columns).clamp(0, max(values.shape[1] - 1, 0))
    inside = (offset >= 0) & (offset < num)
    taken = take(values, source)
    if isinstance(fill, Tensor):
        return torch.where(inside[..., None], take(fill, offset.clamp(0, num - 1)), taken)
    return taken.masked_fill(inside, fill)


def take(values: Tensor, columns: Tensor) -> Tensor:
    """Gather columns per row, `values[b, columns[b, t]]`: from `(B, L, ...)`, with `(B, T)`, to `(B, T, ...)`."""
    rows = torch.arange(values.shape[0], device=values.device)[:, None] * values.shape[1]
    picked = values.flatten(0, 1).index_select(0, (rows + columns.to(values.device)).flatten())
    return picked.unflatten(0, columns.shape)


def insert_positions(position_ids: Tensor, start: Tensor, num: int, before: Tensor | None = None) -> Tensor:
    """Insert columns into position ids: they continue the positions before them, and later positions shift by `num`.

    From `(..., B or 1, L)` to `(..., B, L + num)`; `start` `(B,)` is at least 1. `before` `(B,)` is the column that
    they continue; `None`: the one before `start`.
    """
    position_ids = position_ids.expand(*position_ids.shape[:-2], start.shape[0], -1)
    length = position_ids.shape[-1]
    columns = torch.arange(length + num, device=position_ids.device)
    offset = columns - start.to(position_ids.device)[:, None]  # (B, L + num)
    continued = (start - 1 if before is None else before).to(columns.device)[:, None]
    source = torch.where(offset >= num, columns - num, torch.where(offset >= 0, continued, columns))
    shift = (offset + 1).clamp(0, num)
    return position_ids.gather(-1, source.expand(*position_ids.shape[:-1], -1)) + shift


def write_thoughts(embeddings: Tensor, thoughts: Tensor, start: Tensor) -> Tensor:
    """Replace the embeddings at the thought positions, out of place.

    Args:
        embeddings: `(B, L, H)`.
        thoughts: `(B, N, H)`, of any dtype, on any device.
        start: Column of the first thought, `(B,)`; may be negative or beyond L if thoughts are partly outside.

    Returns:
        `(B, L, H)` in the embeddings' dtype.
    """
    thoughts = thoughts.to(embeddings)
    columns = torch.arange(embeddings.shape[1], device=embeddings.device)
    offset = columns - start.to(embeddings.device)[:, None]  # (B, L)
    inside = (offset >= 0) & (offset < thoughts.shape[1])
    index = offset.clamp(0, thoughts.shape[1] - 1)[..., None].expand(-1, -1, thoughts.shape[2])
    return torch.where(inside[..., None], thoughts.gather(1, index), embeddings)


# From the placed columns back to the caller's


def restore(
    output: _T,
    start: Tensor,
    num: int,
    length: int,
    requested: Tensor | None = None,
    last_rows: bool = False,
    column: int | None = None,
) -> _T:
    """Align all per-token values in a model's output with the caller's tokens.

    The last prompt token gets the values of the last thought, which predicts the first response token. The values of
    the other thoughts are removed, and so are the key columns of attentions at thought positions.

    Args:
        output: A `ModelOutput`, tuple or dict of the base.
        start: First inserted column of each row, `(B,)`.
        num: N, the number of inserted columns.
        length: L, the number of the caller's columns in this call.
        requested: The caller's columns `(K,)` in `logits_to_keep`, if the base returned the logits of both placed
            columns that each can have, `[requested, requested + N]`.
        last_rows: Whether the base returned only the logits of the last columns, which need no change.
        column: `start` as a number, if it is known to be the same for all rows.

    Returns:
        An output of the same type.
    """
    batch, placed = start.shape[0], length + num
    logits_pending = last_rows or requested is not None

    def align(tensor: Tensor) -> Tensor:
        """Take the placed column of each token, `(B, L, ...)`; of L - 1 tokens if labels are already shifted."""
        if column is None:
            columns = torch.arange(tensor.shape[1] - num, device=start.device)
            return take(tensor, columns + num * (columns >= start[:, None] - 1))
        after = tensor[:, column - 1 + num :]
        return after if column == 1 else torch.cat([tensor[:, : column - 1], after], dim=1)

    def change(tensor: Tensor, name: str) -> Tensor:
        nonlocal logits_pending
        shape = tensor.shape
        if logits_pending and tensor.dim() == 3:  # the first three-dimensional tensor in any causal LM's output
            logits_pending = False
            if requested is None:
                return tensor
            shifted = requested.to(start.device) >= start[:, None] - 1  # (B, K)
            return take(tensor, torch.arange(len(requested), device=start.device) + shifted * len(requested))
        states = name.endswith("hidden_states")
        # Several residual streams of hidden states (S, B, L, H)
        if tensor.dim() == 4 and shape[1:3] == (batch, placed) and (states or shape[0] != batch):
            return align(tensor.movedim(0, 2)).movedim(2, 0)
        if tensor.dim() == 4 and shape[0] == batch and shape[2] == placed:  # attentions (B, heads, query, key)
            columns = torch.arange(length, device=start.device)
            keys = columns + num * (columns >= start[:, None])  # (B, L): the placed column of each token
            return _take_keys(align(tensor.transpose(1, 2)).transpose(1, 2), keys, placed)
        # One column less if the values are already aligned with shifted labels
        if tensor.dim() >= 2 and shape[0] == batch and shape[1] in (placed, placed - 1):
            return align(tensor)
        if tensor.dim() >= 2 and shape[0] == batch * placed:  # router logits of MoE models (B * L, experts)
            return align(tensor.unflatten(0, (batch, placed))).flatten(0, 1)
        return tensor

    return _map_tensors(output, change)


def repeat_rows(output: _T, source: Tensor, num: int) -> _T:
    """Repeat `num` distinct rows in all tensors of an output: row b is a copy of row `source[b]`, `source` `(B,)`."""

    def change(tensor: Tensor, name: str) -> Tensor:
        return tensor[source.to(tensor.device)] if tensor.dim() > 1 and len(tensor) == num else tensor

    return _map_tensors(output, change)


def first_of_each(output: _T, rows: int, repeats: int) -> _T:
    """Reduce the `repeats` adjacent copies of each of `rows` rows in all tensors of an output.

    Numbers by token, `(B, L)`, such as log-probabilities, become their means, as a loss is; of everything else, the
    first copy is kept.
    """
    total = rows * repeats

    def change(tensor: Tensor, name: str) -> Tensor:
        if tensor.dim() == 4 and tensor.shape[1] == total != tensor.shape[0] and name.endswith("hidden_states"):
            return tensor[:, ::repeats]  # several residual streams (S, B, L, H)
        if tensor.dim() < 2 or tensor.shape[0] % total:
            return tensor
        if tensor.dim() == 2 and tensor.is_floating_point() and len(tensor) == total:
            return tensor.unflatten(0, (rows, repeats)).mean(1)
        return tensor.unflatten(0, (total, -1))[::repeats].flatten(0, 1)  # rows, or tokens of rows (router logits)

    return _map_tensors(output, change)


def restore_keys(output: _T, start: Tensor, num: int) -> _T:
    """Remove thought positions from the key columns of attentions in the output of a decoding step."""

    def change(tensor: Tensor, name: str) -> Tensor:
        if tensor.dim() != 4 or tensor.shape[0] != start.shape[0]:
            return tensor
        columns = torch.arange(tensor.shape[3] - num, device=start.device)
        return _take_keys(tensor, columns + num * (columns >= start[:, None]), tensor.shape[3])

    return _map_tensors(output, change)


def _take_keys(attentions: Tensor, keys: Tensor, placed: int) -> Tensor:
    """Select key columns of attentions `(B, heads, query, key)`; key columns after the placed ones are kept."""
    keys = keys.to(attentions.device)
    beyond = torch.arange(placed, attentions.shape[3], device=keys.device).expand(keys.shape[0], -1)
    keys = torch.cat([keys, beyond], dim=1)
    index = keys[:, None, None].expand(-1, attentions.shape[1], attentions.shape[2], -1)
    return attentions.gather(3, index)


def _map_tensors(output: Any, change: Callable[[Tensor, str], Tensor], name: str = "") -> Any:
    """Apply a function to every tensor of a nested output, together with its field name, if any.

    Caches and other objects are returned unchanged.
    """
    if isinstance(output, Tensor):
        return change(output, name)
    if isinstance(output, dict):  # ModelOutput is one
        changed = copy.copy(output)
        for key, value in output.items():
            changed[key] = _map_tensors(value, change, key)
        return changed
    if isinstance(output, (tuple, list)):
        return type(output)(_map_tensors(value, change, name) for value in output)
    return output
