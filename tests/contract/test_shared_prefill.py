"""Samples of one prompt share its assistant pass and its prefill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from batches import base_passes, generated
from helpers import assistant_passes, never_share_prefill
from peft import PeftModel
from tiny_pair import Pair

TEXTS = ["What is two plus two?", "One?"]
NEW = 5


@contextmanager
def rows_run(model: PeftModel) -> Iterator[tuple[list[int], list[int]]]:
    """Rows of every pass of the base and of the assistant."""
    with base_passes(model) as base, assistant_passes(model) as assistant:
        yield base, assistant


def sample(model: PeftModel, batch: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    torch.manual_seed(1)
    with torch.no_grad():
        return generated(model, batch, NEW, min_new_tokens=NEW, **options)


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({"do_sample": True, "num_return_sequences": 5}, 5),
        ({"num_beams": 3}, 3),
        ({"num_beams": 4, "num_return_sequences": 2}, 4),
    ],
    ids=["samples", "beams", "several of the beams"],
)
@pytest.mark.parametrize("run", [False, True], ids=["prompt's end", "run"])
def test_copies_are_made_after_the_prefill(
    pair: Pair, options: dict[str, Any], copies: int, run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pair.model(thought_token="<thought>")
    batch = pair.batch([text + "<thought>" * 4 * run for text in TEXTS])
    with rows_run(model) as (base, assistant):
        found = sample(model, batch, **options)
    assert assistant == [2]
    assert base[0] == 2
    assert set(base[1:]) == {2 * copies}
    never_share_prefill(monkeypatch)
    with rows_run(model) as (base, _):
        assert sample(model, batch, **options) == found
    assert base[0] == 2 * copies


def test_equal_rows_next_to_each_other_are_read_once(pair: Pair) -> None:
    model = pair.model()
    alone = [sample(model, pair.batch([text]), do_sample=False)[0] for text in TEXTS]
    with rows_run(model) as (base, assistant):
        found = sample(model, pair.batch([TEXTS[0]] * 3 + [TEXTS[1]] * 2 + [TEXTS[0]]), do_sample=False)
    assert found == [alone[0]] * 3 + [alone[1]] * 2 + [alone[0]]
    assert (base[0], base[1], assistant) == (3, 6, [3])


def test_equal_rows_are_sampled_apart(pair: Pair) -> None:
    found = sample(pair.model(), pair.batch([TEXTS[0]] * 6), do_sample=True)
    assert len({tuple(row) for row in found}) > 1


def test_right_padded_copies(pair: Pair) -> None:
    model = pair.model()
    alone = [sample(model, pair.batch([text]), do_sample=False)[0] for text in TEXTS]
    batch = pair.batch([TEXTS[1], TEXTS[1], TEXTS[0]], "right")
    with rows_run(model) as (base, _):
        assert sample(model, batch, do_sample=False) == [alone[1], alone[1], alone[0]]
    assert base[0] == 2


def test_scores_of_copies(pair: Pair) -> None:
    model, batch = pair.model(), pair.batch(TEXTS)
    options = {"do_sample": True, "num_return_sequences": 3, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        found = model.generate(**batch, max_new_tokens=NEW, min_new_tokens=NEW, **options)
    assert [len(logits) for logits in found.logits] == [6] * NEW
    assert torch.equal(found.logits[0][0], found.logits[0][2])
    assert not torch.equal(found.logits[0][0], found.logits[0][3])


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"output_hidden_states": True, "return_dict_in_generate": False},
        {"prefill_chunk_size": 3},
    ],
    ids=str,
)
def test_ways_that_cannot_share_a_prefill_write_the_same(
    pair: Pair, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pair.model()
    batch = pair.batch([TEXTS[0]] * 2)
    expected = sample(model, pair.batch(TEXTS[:1]), do_sample=False) * 2
    with rows_run(model) as (base, assistant):
        assert sample(model, batch, do_sample=False, **options) == expected
    assert (base[0], assistant) == (2, [1])


def test_rows_with_assistant_input_of_their_own_are_no_copies(pair: Pair) -> None:
    model = pair.model()
    ids = torch.tensor([[5, 6, 0, 0, 0, 0], [7, 8, 0, 0, 0, 0]])
    batch = {**pair.batch([TEXTS[0]] * 2), "assistant_input_ids": ids}
    with rows_run(model) as (base, assistant):
        found = sample(model, batch, do_sample=False)
    assert (base[0], assistant) == (2, [2])
    one = sample(model, {**pair.batch([TEXTS[0]]), "assistant_input_ids": ids[1:]}, do_sample=False)
    assert found[1:] == one
