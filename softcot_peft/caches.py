"""What a cache remembers of the thoughts in it, so that the tokens that follow are read in the right place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from torch import Tensor

from ._compat import CACHE_NAME, cache_length
from .placement import Placement

_RECORD = "softcot_record"  # attribute of a cache
# Methods of transformers' caches that pick rows, with their index as the only argument (5.23).
_ROW_METHODS = ("reorder_cache", "batch_select_indices")


@dataclass(frozen=True)
class Record:
    """The thoughts in a cache.

    Args:
        placement: Where they stand.
        adapter: Name of the adapter that made them.
        end: How long the cache is at least while it holds all of them.
    """

    placement: Placement
    adapter: str
    end: int


def remember(cache: Any, placement: Placement, adapter: str) -> None:
    """Note on a cache that has just been filled where the thoughts stand in it.

    Rows that are picked from the cache by its own methods (beam search by hand) are picked from the note as well.

    Args:
        cache: A cache of transformers.
        placement: Where the thoughts stand.
        adapter: Name of the adapter that made them.
    """
    end = min(cache_length(cache), placement.latest + placement.num_thoughts)
    setattr(cache, _RECORD, Record(placement, adapter, end))
    if not issubclass(type(cache), _Recorded):
        # A class rather than methods of the instance, through which the cache would hold itself, and its memory.
        cache.__class__ = _recorded(cache.__class__)


class _Recorded:
    """Marks caches that pick rows from their record, too."""


@functools.cache
def _recorded(kind: type) -> type:
    picking = {name: functools.partialmethod(_pick_rows, kind, name) for name in _ROW_METHODS if hasattr(kind, name)}
    return type(kind.__name__, (_Recorded, kind), picking)


def _pick_rows(cache: Any, kind: type, name: str, rows: Tensor) -> None:
    getattr(kind, name)(cache, rows)
    record: Record = getattr(cache, _RECORD)
    setattr(cache, _RECORD, replace(record, placement=record.placement.select(rows)))


def recall(cache: Any, adapter: str | None) -> Placement | None:
    """Where the thoughts stand in a cache that holds tokens.

    Args:
        cache: A cache of transformers.
        adapter: Name of the active adapter; `None` when adapters are disabled.

    Returns:
        The placement; `None` when there are no thoughts in it and adapters are disabled.

    Raises:
        ValueError: The cache was filled with another adapter than the active one, or without any; or thoughts were
            cropped from it.
    """
    record: Record | None = getattr(cache, _RECORD, None)
    if record is None:
        if adapter is None:
            return None
        raise ValueError(
            f"`{CACHE_NAME}` must come from a pass with thoughts, but holds tokens that were read without. "
            "Start from an empty cache, with the whole prompt in `input_ids`, or disable the adapter."
        )
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
    return record.placement


def crop_in_callers_columns(cache: Any, added: int) -> None:
    """Have a cache cropped to lengths in the caller's columns.

    Drafts that are not accepted are dropped by `crop`. Transformers 5.23 says how many (negative), which needs no
    translation; earlier releases say how many tokens stay. There the cache is a part of itself from here on, and its
    memory is free only when Python has looked for such cycles.

    Args:
        cache: A cache of transformers.
        added: How many columns it holds beyond the caller's.
    """
    if hasattr(cache, "crop") and "tokens_to_remove" not in inspect.signature(cache.crop).parameters:
        crop: Callable[..., None] = functools.partial(_crop, added)
        cache.crop = MethodType(crop, cache)


def _crop(added: int, cache: Any, length: int) -> None:
    type(cache).crop(cache, length + added if length > 0 else length)
