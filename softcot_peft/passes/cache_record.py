"""Records the thoughts in a KV cache, and checks that caches and positions have room for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compat.caches import CACHE_NAME, cache_length, counts_tokens, fixed_length
from ..compat.models import position_limit
from ..rows.arguments import is_padding_mask, tokens
from ..rows.placement import Placement, trailing

_RECORD = "softcot_record"  # the attribute of a cache that holds its record


@dataclass(frozen=True)
class Record:
    """The thoughts in a cache, without anything that depends on the selected rows."""

    placement: Placement  # the thought positions, without per-row values
    adapter: str  # name of the adapter that produced them
    length: int  # number of the caller's columns in the prompts
    end: int  # minimum cache length at which it holds all thoughts


def remember(cache: Any, placement: Placement, adapter: str, length: int) -> None:
    """Record the thought positions on a cache that has just been filled."""
    end = min(cache_length(cache), placement.latest + placement.num_thoughts)
    any_row = replace(placement, start=torch.empty(0, dtype=torch.long), attention_mask=None)
    setattr(cache, _RECORD, Record(any_row, adapter, length, end))


def forget(cache: Any) -> None:
    """Delete the record of a cache that has been emptied."""
    getattr(cache, "__dict__", {}).pop(_RECORD, None)


def recall(cache: Any, adapter: str | None, inputs: dict[str, Any]) -> Placement | None:
    """Return the thought positions in a cache, for the rows of the pass that continues from it.

    Rows of the cache may have been selected or repeated since it was filled. Per-row values are therefore derived from
    the mask of this pass, whose rows match those of the cache.
    """
    record: Record | None = getattr(cache, _RECORD, None)
    if record is None and adapter is None:
        return None
    if record is None:
        raise ValueError(
            f"`{CACHE_NAME}` must come from a call of the model with thoughts, but was filled without them, or "
            "by `generate`. Start from an empty cache, with the whole prompt in `input_ids`, or disable the adapter."
        )
    if adapter is None and cache_length(cache) == 0:
        forget(cache)
        return None
    if record.adapter != adapter:
        now = "adapters are disabled now" if adapter is None else f"{adapter!r} is active now"
        raise ValueError(
            f"`{CACHE_NAME}` must come from a pass with the same adapter, but holds the thoughts of "
            f"{record.adapter!r}, and {now}. Start from an empty cache, with the whole prompt in `input_ids`."
        )
    if cache_length(cache) < record.end:
        raise ValueError(
            f"`{CACHE_NAME}` must hold all thoughts, but was cropped to {cache_length(cache)} positions, and the "
            f"thoughts end at {record.end}. A cache counts thoughts too; crop less, or start from an empty cache."
        )
    return replace(record.placement, start=_starts(record, inputs, cache))


def _starts(record: Record, inputs: dict[str, Any], cache: Any) -> Tensor:
    """Return the column of each row's first thought, `(B,)`."""
    reference, mask, placement = tokens(inputs), inputs.get("attention_mask"), record.placement
    by_row = placement.inserted and placement.column is None
    needed = placement.padded and counts_tokens(cache)
    if needed if mask is None else not (is_padding_mask(mask) and mask.shape[1] >= record.length):
        found = "none" if mask is None else tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"`attention_mask` must be the padding mask of all tokens so far, (batch, {record.length} and more), got "
            f"{found}. After `{CACHE_NAME}`, pass the prompts' mask, followed by a 1 for every token since."
        )
    tail = placement.tail
    if by_row and tail is None:
        raise ValueError(
            f"`{CACHE_NAME}` must come from prompts without labels, or from rows with the same number of tokens after "
            "the thoughts, but that number differs by row, and caches do not know their rows. Leave out `labels`, or "
            "run the rows one by one."
        )
    if by_row and tail is not None and mask is not None:  # the same number of columns before the end of every row
        return record.length - trailing(mask[:, : record.length]) - tail
    return torch.full((len(reference),), placement.latest, device=reference.device)


def check_room(
    model: PreTrainedModel, cache: Any, inputs: dict[str, Any], columns: int, added: int = 0, new: int = 1
) -> None:
    """Reject a pass without room for its thoughts or for the tokens that follow them.

    If `new` tokens do not fit even without thoughts, the caller expects sequences to end early: the check then covers
    the thoughts alone, and a sequence that does not end in time is rejected when it runs out of room.

    Args:
        model: The base.
        cache: The cache of the pass, if any.
        inputs: Arguments of the forward.
        columns: Number of columns that the base has processed after the pass.
        added: Number of thoughts still to be inserted.
        new: Maximum number of tokens to generate.

    Raises:
        ValueError: The tokens and thoughts exceed the base's positions or a cache of fixed size.
    """
    limit, size = position_limit(model.config), fixed_length(cache, model.config)
    reached, positions, mask = columns, inputs.get("position_ids"), inputs.get("attention_mask")
    if limit is not None and columns + added + new - 1 > limit:  # padding may take no positions
        if isinstance(positions, Tensor):
            reached = int(positions.max()) + 1
        elif isinstance(mask, Tensor) and mask.shape == tokens(inputs).shape[:2]:
            reached = int(mask.ne(0).sum(1).max())
    rooms = ((limit, reached, "the base's {} positions"), (size, columns, f"the {{}} columns of `{CACHE_NAME}`"))
    for room, used, what in rooms:
        if room is None or used + added + (new - 1 if used + new - 1 <= room else 0) <= room:
            continue
        left = room - used - added + 1
        raise ValueError(
            f"Tokens and thoughts must fit into {what.format(room)}, got {used}{f' + {added}' if added else ''}"
            f"{f', which leaves room for {left} new tokens, not {new}' if left > 0 else ''}. Shorten the input, lower "
            "`max_new_tokens`, `num_thought_tokens` or `inference_num_thought_tokens`"
            f"{'' if room is limit else ', or make the cache longer'}."
        )
