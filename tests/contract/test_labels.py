"""Labels that say where thoughts go: several supervised turns, rows without labels, sampled thought tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import step
from one_question import ANSWER, LATER, PROMPT, response_batch
from oracle import Oracle
from tiny_pair import Pair
from torch import Tensor, nn

THOUGHT = "<thought>"


# Conversations with several supervised turns


def turns(pair: Pair, run: bool) -> dict[str, Tensor]:
    """Two questions, both answers labelled; with a run of thought tokens before the second answer."""
    parts = [(PROMPT, False), (ANSWER, True), ("Again? " + PROMPT, False), (LATER, True)]
    ids, labels = list[int](), list[int]()
    for text, supervised in parts:
        piece = pair.tokenizer(text)["input_ids"]
        if run and text == LATER:
            thoughts = [pair.tokenizer.convert_tokens_to_ids(THOUGHT)] * 4
            ids, labels = ids + thoughts, labels + [-100] * 4
        ids, labels = ids + piece, labels + (piece if supervised else [-100] * len(piece))
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}


def shifted(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return batch | {"shift_labels": labels}  # beside the labels, as trainers that divide rows between devices have it


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("form", [dict, shifted], ids=["labels", "shift_labels"])
def test_several_supervised_turns_are_refused(pair: Pair, train: bool, form: Callable[..., Any]) -> None:
    batch, model = turns(pair, run=False), pair.model().train(train)
    first, second = (len(pair.tokenizer(text)["input_ids"]) for text in (PROMPT, PROMPT + ANSWER + "Again? " + PROMPT))
    with pytest.raises(
        ValueError, match=rf"row 0 form several, which begin in columns \[{first}, {second}\].*split_conv"
    ):
        model(**form(batch))


@pytest.mark.parametrize("two", [True, False], ids=["two passes", "one pass"])
@pytest.mark.parametrize("form", [dict, shifted], ids=["labels", "shift_labels"])
def test_labels_before_an_explicit_run_are_left_out_of_the_loss_and_said_once(
    pair: Pair, form: Callable[..., Any], two: bool
) -> None:
    model = pair.model(thought_token=THOUGHT, placement="thought_token", two_pass_training=two).train()
    batch = turns(pair, run=True)
    later = batch | {"labels": batch["labels"].clone()}
    later["labels"][:, : batch["input_ids"].shape[1] - len(pair.tokenizer(LATER)["input_ids"])] = -100
    expected = model(**form(later)).loss
    with pytest.warns(UserWarning, match="Labels before the runs.*split_conversations"):
        found = model(**form(batch)).loss
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    model(**form(batch))  # warnings are errors
    oracle = Oracle.of(model, pair.base, pair.assistant, 4)
    ids = batch["input_ids"][0].tolist()
    at = ids.index(pair.tokenizer.convert_tokens_to_ids(THOUGHT))
    torch.testing.assert_close(found, oracle.loss(ids[:at], ids[at + 4 :]), atol=1e-5, rtol=1e-5)


# Rows without labels, and sampled thought tokens


@pytest.mark.parametrize("two", [True, False], ids=["two passes", "one pass"])
@pytest.mark.parametrize("run", [False, True], ids=["prompt's end", "run"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_row_without_labels_adds_nothing(pair: Pair, side: str, run: bool, two: bool, silent: int) -> None:
    mark = THOUGHT * 4 if run else ""
    texts = [PROMPT + mark + LATER, "One?" + mark + ANSWER, PROMPT + " Or three?" + mark + ANSWER]
    model = pair.model(thought_token=THOUGHT, two_pass_training=two).train()

    def batch(texts: list[str], unlabelled: int | None) -> dict[str, Tensor]:
        rows = dict(pair.tokenizer(texts, return_tensors="pt", padding=True, padding_side=side))
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        for row, text in enumerate(texts):
            prompt = len(pair.tokenizer(text[: text.rindex("?") + 1] + mark)["input_ids"])
            begin = int(rows["attention_mask"][row].argmax())
            labels[row, : begin + prompt] = -100
            if row == unlabelled:
                labels[row] = -100
        return rows | {"labels": labels}

    others = [text for row, text in enumerate(texts) if row != silent]
    expected, wanted = step(model, batch(others, None))
    found, gradient = step(model, batch(texts, silent))
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("two", [True, False], ids=["two passes", "one pass"])
def test_a_batch_without_labels_has_the_base_s_loss(pair: Pair, two: bool) -> None:
    model, batch = pair.model(two_pass_training=two).train(), response_batch(pair)
    none = batch | {"labels": torch.full_like(batch["labels"], -100)}
    for _ in range(2):  # before and after two passes are tried
        assert model(**none).loss.isnan()
        assert model(**none, num_items_in_batch=7).loss == 0
        model(**batch)


@pytest.mark.parametrize("placement", ["prompt_end", "thought_token"])
@pytest.mark.parametrize("sampled", [(0, 0), (1, 0), (1, 1), (3, 1)])
def test_sampled_thought_tokens_are_text(pair: Pair, placement: Any, sampled: tuple[int, int]) -> None:
    model = pair.model(thought_token=THOUGHT, placement=placement)
    thought, run = pair.tokenizer.convert_tokens_to_ids(THOUGHT), [] if placement == "prompt_end" else [1] * 4
    (prompt,), (answer,) = pair.rows([PROMPT]), pair.rows([" five, it is"])
    ids, labels, expected = [], [], []
    oracle = Oracle.of(model, pair.base, pair.assistant, 4)
    for number in sampled:
        response = answer[:3] + [thought] * number + answer[3 : 5 + 3 - number]
        before = prompt + [thought] * len(run)
        ids.append(before + response)
        labels.append([-100] * len(before) + response)
        with torch.no_grad():
            expected.append(oracle.loss(prompt, response))
    found = model(torch.tensor(ids), labels=torch.tensor(labels)).loss
    torch.testing.assert_close(found, torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


def test_a_run_that_is_labelled_itself_is_named(pair: Pair) -> None:
    ids = torch.tensor(pair.rows([PROMPT + THOUGHT * 4 + ANSWER]))
    labels = ids.where((ids == pair.tokenizer.convert_tokens_to_ids(THOUGHT)).cumsum(1) > 0, -100)
    model = pair.model(thought_token=THOUGHT, placement="thought_token")
    with pytest.raises(ValueError, match="`labels` must be -100 on the run of `thought_token`"):
        model(ids, labels=labels)


def test_a_run_behind_all_labels_is_refused(pair: Pair) -> None:
    ids = torch.tensor(pair.rows([PROMPT + ANSWER + THOUGHT * 4]))
    labels = torch.full_like(ids, -100)
    labels[0, -6] = ids[0, -6]
    with pytest.raises(ValueError, match=r"must stand after the thought tokens, but row 0 has its last one in column"):
        pair.model(thought_token=THOUGHT)(ids, labels=labels)
