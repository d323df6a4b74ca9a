"""The keys under which thoughts of a prompt are kept."""

from __future__ import annotations

import torch
from helpers import prompt_keys
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


def key_of(ids: list[int], num: int) -> int:
    """The key of one prompt, in Python's numbers, from the definition."""
    most = 2**64 - 1

    def factor(place: int) -> int:
        mixed = (place + 1) * 0x9E3779B97F4A7C15 & most
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & most
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & most
        return mixed ^ mixed >> 31 | 1

    def spread(number: int) -> int:
        product = number * 0x9E3779B97F4A7C15 & most
        high = product >> 32 | (0xFFFFFFFF00000000 if product >> 63 else 0)  # as a signed number is moved
        return product ^ high | 1

    total = factor(0) * num
    for place, token in enumerate(reversed(ids)):
        total += factor(place + 1) * spread(token + 1)
    total &= most
    return total - 2**64 if total >> 63 else total


PROMPTS = st.lists(st.lists(st.integers(0, 2**18), min_size=1, max_size=20), min_size=1, max_size=5)


@given(PROMPTS, st.integers(1, 64), st.integers(0, 30), st.integers(0, 3))
def test_keys_are_those_of_single_prompts_however_they_are_padded(
    prompts: list[list[int]], num: int, padding: int, filler: int
) -> None:
    ids = pad_sequence([torch.tensor(row) for row in prompts], True, filler, "left")
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in prompts], True, 0, "left")
    ids, mask = nn.functional.pad(ids, (padding, 0), value=filler), nn.functional.pad(mask, (padding, 0))
    assert prompt_keys(ids, mask, num).tolist() == [key_of(row, num) for row in prompts]
    assert prompt_keys(ids.int(), mask, num).tolist() == [key_of(row, num) for row in prompts]


def test_length_order_number_and_every_token_are_in_the_key() -> None:
    rows = [[0] * length for length in range(1, 40)]  # prompts that are ends of others
    rows += [[5, 6, 7], [7, 6, 5], [6, 5, 7], [5, 6], [6, 7], [5, 6, 7, 0], [5, 6, 8]]
    keys = {key for num in (1, 2, 4, 32) for row in rows for key in prompt_keys(torch.tensor([row]), ONE(row), num)}
    assert len({int(key) for key in keys}) == 4 * len(rows)


def ONE(row: list[int]) -> Tensor:  # noqa: N802
    return torch.ones(1, len(row), dtype=torch.long)


def test_a_hundred_thousand_similar_prompts_have_different_keys() -> None:
    ids = torch.randint(0, 4, (100_000, 24), generator=torch.Generator().manual_seed(0)).unique(dim=0)
    assert len(prompt_keys(ids, torch.ones_like(ids), 32).unique()) == len(ids) > 99_000
