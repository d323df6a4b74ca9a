"""Columns inserted into the rows of a batch and taken out again, as pure tensor functions.

Two coordinate systems meet here. The *caller's* columns are the tokens the caller knows, L of them. The *placed*
columns are what the base sees: the same tokens with N thought positions before column `start`, which may differ by
row.
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
        start: Column of the first inserted one, per row, `(B,)`.
        num: How many.
        fill: What they hold: a number, or `(B, num, H)`.
        column: `start` as a number, where it is known to be the same in every row.

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
    """Pick columns of every row, `values[b, columns[b, t]]`: of `(B, L, ...)` by `(B, T)` to `(B, T, ...)`."""
    rows = torch.arange(values.shape[0], device=values.device)[:, None] * values.shape[1]
    picked = values.flatten(0, 1).index_select(0, (rows + columns.to(values.device)).flatten())
    return picked.unflatten(0, columns.shape)


def insert_positions(position_ids: Tensor, start: Tensor, num: int) -> Tensor:
    """Give inserted columns the positions that follow, and move the later ones up.

    From `(..., B or 1, L)` to `(..., B, L + num)`; `start` `(B,)` is at least 1.
    """
    position_ids = position_ids.expand(*position_ids.shape[:-2], start.shape[0], -1)
    length = position_ids.shape[-1]
    columns = torch.arange(length + num, device=position_ids.device)
    offset = columns - start.to(position_ids.device)[:, None]  # (B, L + num)
    source = torch.where(offset >= 0, (columns - num).maximum(start.to(columns.device)[:, None] - 1), columns)
    shift = (offset + 1).clamp(0, num)
    return position_ids.gather(-1, source.expand(*position_ids.shape[:-1], -1)) + shift


def write_thoughts(embeddings: Tensor, thoughts: Tensor, start: Tensor) -> Tensor:
    """Replace the embeddings at the thought positions, out of place.

    Args:
        embeddings: `(B, L, H)`.
        thoughts: `(B, N, H)`, of any dtype and device.
        start: Column of the first thought, `(B,)`; may be negative or beyond L, when thoughts lie partly outside.

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
    kept: Tensor | None = None,
    last_rows: bool = False,
    column: int | None = None,
) -> _T:
    """Put everything per-token in a model's output back in line with the caller's tokens.

    The row of the last prompt token becomes the row of the last thought, which predicts the first response token; the
    other thought rows go. Key columns of attentions at thought positions go too.

    Args:
        output: A `ModelOutput`, tuple or dict of the base.
        start: Column of the first inserted one, per row, `(B,)`.
        num: N, how many were inserted.
        length: L, the caller's columns in this call.
        kept: Columns `(K,)` of the caller's whose logits were asked for (`logits_to_keep`), when the base returned the
            placed columns `[kept, kept + N]`.
        last_rows: Whether the logits are those of the last rows alone, which need no change.
        column: `start` as a number, where it is known to be the same in every row.

    Returns:
        The same type of output.
    """
    batch, placed = start.shape[0], length + num
    logits_to_come = last_rows or kept is not None

    def in_line(tensor: Tensor) -> Tensor:
        """Take the placed row of each token, `(B, L, ...)`; L - 1 of them where labels were shifted already."""
        if column is None:
            columns = torch.arange(tensor.shape[1] - num, device=start.device)
            return take(tensor, columns + num * (columns >= start[:, None] - 1))
        after = tensor[:, column - 1 + num :]
        return after if column == 1 else torch.cat([tensor[:, : column - 1], after], dim=1)

    def change(tensor: Tensor, name: str) -> Tensor:
        nonlocal logits_to_come
        shape = tensor.shape
        if logits_to_come and tensor.dim() == 3:  # the first of three dimensions in every causal LM's output
            logits_to_come = False
            if kept is None:
                return tensor
            late = kept.to(start.device) >= start[:, None] - 1  # (B, K)
            return take(tensor, torch.arange(kept.shape[0], device=start.device) + late * kept.shape[0])
        states = name.endswith("hidden_states")
        # Several streams of states (S, B, L, H)
        if tensor.dim() == 4 and shape[1:3] == (batch, placed) and (states or shape[0] != batch):
            return in_line(tensor.movedim(0, 2)).movedim(2, 0)
        if tensor.dim() == 4 and shape[0] == batch and shape[2] == placed:  # attentions (B, heads, query, key)
            columns = torch.arange(length, device=start.device)
            keys = columns + num * (columns >= start[:, None])  # (B, L): the placed column of each token itself
            return _take_keys(in_line(tensor.transpose(1, 2)).transpose(1, 2), keys, placed)
        # One row less where they were compared with shifted labels already
        if tensor.dim() >= 2 and shape[0] == batch and shape[1] in (placed, placed - 1):
            return in_line(tensor)
        if tensor.dim() >= 2 and shape[0] == batch * placed:  # routers of mixtures of experts (B * L, experts)
            return in_line(tensor.unflatten(0, (batch, placed))).flatten(0, 1)
        return tensor

    return _map_tensors(output, change)


def repeat_rows(output: _T, source: Tensor, num: int) -> _T:
    """Give each row the values of the distinct row that it repeats, `source` `(B,)`, one of `num`."""

    def change(tensor: Tensor, name: str) -> Tensor:
        return tensor[source.to(tensor.device)] if tensor.dim() > 1 and len(tensor) == num else tensor

    return _map_tensors(output, change)


def restore_keys(output: _T, start: Tensor, num: int) -> _T:
    """Drop thought positions from the key columns of attentions in the output of a step after the thoughts."""

    def change(tensor: Tensor, name: str) -> Tensor:
        if tensor.dim() != 4 or tensor.shape[0] != start.shape[0]:
            return tensor
        columns = torch.arange(tensor.shape[3] - num, device=start.device)
        return _take_keys(tensor, columns + num * (columns >= start[:, None]), tensor.shape[3])

    return _map_tensors(output, change)


def _take_keys(attentions: Tensor, keys: Tensor, placed: int) -> Tensor:
    """Pick key columns of `(B, heads, query, key)` attentions; key columns beyond the placed ones stay."""
    keys = keys.to(attentions.device)
    beyond = torch.arange(placed, attentions.shape[3], device=keys.device).expand(keys.shape[0], -1)
    keys = torch.cat([keys, beyond], dim=1)
    index = keys[:, None, None].expand(-1, attentions.shape[1], attentions.shape[2], -1)
    return attentions.gather(3, index)


def _map_tensors(output: Any, change: Callable[[Tensor, str], Tensor], name: str = "") -> Any:
    """Apply a function to every tensor of a nested output and the name of its field, if it has one.

    Caches and other objects stay as they are.
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
