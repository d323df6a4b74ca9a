"""Finds `response_marker` in the text of a batch's rows: thoughts stand before the token with its first character."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..rows.facts import IGNORED
from .source import ThoughtSource
from .tokenizers import base_tokenizer

_SHOWN = 60  # characters of a row that an error shows


def find_starts(
    source: ThoughtSource, marker: str, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
) -> Tensor:
    """Return the column of the token before which each row's thoughts stand.

    The marker is searched in the decoded text, since tokenizers merge its characters with their neighbours. Its last
    occurrence before the first label counts, else its last one in the whole row.

    Args:
        source: The active adapter's thought source.
        marker: A literal text.
        input_ids: `(B, L)` ids of the base, padded on either side.
        attention_mask: `(B, L)`, 1 = attended. `None`: all are attended.
        labels: `(B, L)`, -100 = ignored. `None`: no labels.

    Returns:
        `(B,)` int64.

    Raises:
        ValueError: The marker does not occur in a row.
    """
    if source.base_tokenizer is None:  # the field was set after the adapter was attached
        source.base_tokenizer = base_tokenizer(source.config, source.base.name_or_path)
    tokenizer = source.base_tokenizer
    masks = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    marks = torch.full_like(input_ids, IGNORED) if labels is None else labels
    starts = []
    for row, (ids, mask, label) in enumerate(zip(*(each.tolist() for each in (input_ids, masks, marks)), strict=True)):
        columns = [column for column, attended in enumerate(mask) if attended]
        first_label = next((column for column, value in enumerate(label) if value != IGNORED), len(ids))
        attended = [ids[column] for column in columns]
        place = find_marker(tokenizer, attended[: sum(column < first_label for column in columns)], marker)
        if place is None:
            place = find_marker(tokenizer, attended, marker)
        if place is None:
            raise ValueError(_never_occurs(marker, row, _decoder(tokenizer)(attended)))
        starts.append(columns[place])
    return torch.tensor(starts, device=input_ids.device)


def find_marker(tokenizer: PreTrainedTokenizerBase, ids: list[int], marker: str) -> int | None:
    """Return the index of the token with the first character of the last occurrence of a text; `None` if it has none.

    Texts of prefixes are prefixes of the text, but for a last character of which bytes are missing. A bisection finds
    the token that completes the character. A character may consist of several tokens, of which the first counts.
    """
    decode = _decoder(tokenizer)
    text = decode(ids)
    place = text.rfind(marker)
    if place < 0:
        return None
    short, long = 0, len(ids)  # prefixes without and with the character
    while long - short > 1:
        middle = (short + long) // 2
        if decode(ids[:middle]).startswith(text[: place + 1]):
            long = middle
        else:
            short = middle
    while not text[:place].startswith(decode(ids[:short])):
        short -= 1
    return short


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Return a function that decodes ids as they are."""

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode


def _never_occurs(marker: str, row: int, text: str) -> str:
    shown = repr(text if len(text) <= _SHOWN else "..." + text[-_SHOWN:])
    return (
        f"`response_marker` must occur in every row, but {marker!r} does not occur in the text of row {row}: {shown}. "
        "Write it into every prompt and training text exactly as it is in the config, and keep rows from being "
        "truncated before it; or set `response_marker=None` for thoughts at the end of the prompt."
    )
