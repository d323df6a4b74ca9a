"""Long prompts, many thoughts, large batches: memory grows with the tokens, as the plain base's does."""

from __future__ import annotations

import pytest
import torch
from peak import RUNS, make_base_alone, make_batch, make_model

from benchmarks.memory import peak_bytes

pytestmark = pytest.mark.usefixtures("nothing_given")

SIZES = [  # batch, tokens, thoughts
    (1, 512, 8),
    (1, 1024, 8),
    (1, 2048, 8),
    (1, 512, 128),
    (1, 512, 256),
    (1, 512, 512),
    (16, 64, 8),
    (32, 64, 8),
    (64, 64, 8),
    (64, 64, 64),
]


def test_the_peak_is_that_of_the_tensors_alive_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            table = torch.ones(100, 100)
            table = table + table.T  # the old one is alive until here

    assert peak_bytes(run) == 2 * 100 * 100 * 4


def test_the_peak_leaves_out_what_was_there_before_views_of_it_too() -> None:
    layer, row = torch.nn.Linear(300, 200), torch.ones(1, 300)
    assert peak_bytes(lambda: layer(row)) == 200 * 4


def test_attention_that_makes_its_table_is_found_quadratic() -> None:
    base = make_base_alone(attn_implementation="eager")
    short, long = (peak_bytes(RUNS["forward"], base, make_batch(1, size)) for size in (1024, 2048))
    assert long > 3 * short


@pytest.mark.parametrize("run", ["forward", "generate", "all logits"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_thoughts_cost_what_as_many_more_tokens_cost_the_base(run: str, size: tuple[int, int, int]) -> None:
    batch, length, num = size
    found = peak_bytes(RUNS[run], make_model(num), make_batch(batch, length))
    plain = peak_bytes(RUNS[run], make_base_alone(), make_batch(batch, length + num))
    assert found < 1.15 * plain


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("smaller", [(1, 512, 8), (1, 1024, 8), (1, 8, 256), (32, 64, 8)], ids=str)
def test_twice_the_tokens_take_at_most_twice_the_memory(run: str, smaller: tuple[int, int, int]) -> None:
    batch, length, num = smaller
    larger = {1: (1, 2 * length, num), 32: (64, length, num)}[batch] if num < length else (1, length, 2 * num)
    once, twice = (
        peak_bytes(RUNS[run], make_model(num), make_batch(batch, length)) for batch, length, num in (smaller, larger)
    )
    assert twice < 2.2 * once
