"""Prompts of 8k tokens, 512 thoughts, batches of 64, apart and together: memory grows with the tokens."""

from __future__ import annotations

import itertools

import pytest
from peak import RUNS, make_base_alone, make_batch, make_model

from benchmarks.memory import peak_bytes

pytestmark = [pytest.mark.timeout(3600), pytest.mark.usefixtures("nothing_given")]


@pytest.mark.parametrize("run", ["forward", "generate", "train"])
def test_memory_is_linear_in_the_prompt(run: str) -> None:
    model = make_model(8)
    found = [peak_bytes(RUNS[run], model, make_batch(1, length)) for length in (1024, 2048, 4096, 8192)]
    assert all(longer < 2.2 * shorter for shorter, longer in itertools.pairwise(found))


@pytest.mark.parametrize("run", ["forward", "generate", "train"])
def test_memory_is_linear_in_the_thoughts(run: str) -> None:
    found = [peak_bytes(RUNS[run], make_model(num), make_batch(1, 64)) for num in (8, 16, 32, 64, 128, 256, 512)]
    assert all(more < 2.2 * fewer for fewer, more in itertools.pairwise(found))


@pytest.mark.parametrize("run", ["forward", "generate", "train"])
def test_memory_is_linear_in_the_batch(run: str) -> None:
    model = make_model(8)
    found = [peak_bytes(RUNS[run], model, make_batch(batch, 128)) for batch in (1, 2, 4, 8, 16, 32, 64)]
    assert all(more < 2.2 * fewer for fewer, more in itertools.pairwise(found))


def test_all_at_once_costs_what_as_many_more_tokens_cost_the_base() -> None:
    found = peak_bytes(RUNS["forward"], make_model(512), make_batch(64, 8192))
    one, two = (peak_bytes(RUNS["forward"], make_base_alone(), make_batch(batch, 8192 + 512)) for batch in (1, 2))
    assert found < 1.15 * (one + 63 * (two - one))
