"""Decoding loops written by hand: caches that are filled, cropped, reordered, saved and misused."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import CLOSE, one_more
from helpers import CACHE_NAME
from oracle import Oracle
from peft import PeftModel
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

N = 4


def prefilled(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Any:
    with torch.no_grad():
        return model(**batch, use_cache=True, logits_to_keep=1, **options)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["dict", "tuple", "own cache"])
def test_decoding_by_hand_goes_on_after_the_thoughts(
    pair: Pair, model: PeftModel, oracle: Oracle, form: str, side: str
) -> None:
    batch = pair.batch(QUESTIONS, side)
    cache = DynamicCache() if form == "own cache" else None
    output = prefilled(model, batch, return_dict=form != "tuple", **{CACHE_NAME: cache})
    if form == "tuple":
        cache = next(value for value in output if isinstance(value, DynamicCache))
    elif form == "dict":
        cache = output[CACHE_NAME]
    token = torch.tensor([[7], [8], [9], [10]])
    with torch.no_grad():
        logits = model(**one_more(batch, token), **{CACHE_NAME: cache}).logits[:, -1]
    for row, last, found in zip(pair.rows(QUESTIONS), token.tolist(), logits, strict=True):
        torch.testing.assert_close(found, oracle.logits(row, last, prompt=row)[-1], **CLOSE)


@pytest.mark.parametrize("way", ["forward", "generate", "training"])
def test_caches_are_gone_as_soon_as_nobody_holds_them(way: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, made = pair.model(), pair.batch(QUESTIONS), []
    init = DynamicCache.__init__

    def note(cache: DynamicCache, *args: Any, **kwargs: Any) -> None:
        init(cache, *args, **kwargs)
        made.append(weakref.ref(cache))

    monkeypatch.setattr(DynamicCache, "__init__", note)
    gc.collect()
    gc.disable()  # cycles would hide in memory until Python looks for them
    try:
        if way == "training":
            labels = batch["input_ids"].index_fill(1, torch.arange(batch["input_ids"].shape[1] - 2), -100)
            model.train()(**batch, labels=labels).loss.backward()
        elif way == "generate":
            model.generate(**batch, max_new_tokens=2)
        else:
            prefilled(model, batch)
        assert made
        assert not any(cache() for cache in made)
    finally:
        gc.enable()


@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
def test_rows_picked_from_a_cache_keep_their_own_thoughts(
    pair: Pair, model: PeftModel, oracle: Oracle, method: str
) -> None:
    batch, rows = pair.batch(QUESTIONS, "right"), torch.tensor([2, 0, 0, 3])
    cache = copy.deepcopy(prefilled(model, batch)[CACHE_NAME])
    getattr(cache, method)(rows)
    picked = {name: value[rows] for name, value in batch.items()}
    token = torch.tensor([[7], [8], [9], [10]])
    with torch.no_grad():
        logits = model(**one_more(picked, token), **{CACHE_NAME: cache}).logits[:, -1]
    prompts = pair.rows(QUESTIONS)
    for index, last, found in zip(rows.tolist(), token.tolist(), logits, strict=True):
        expected = oracle.logits(prompts[index], last, prompt=prompts[index])[-1]
        torch.testing.assert_close(found, expected, **CLOSE)


def check_next(
    oracle: Oracle, model: PeftModel, prompts: list[list[int]], step: dict[str, Tensor], cache: Any
) -> None:
    """The next token of every row after a cache."""
    with torch.no_grad():
        logits = model(**step, **{CACHE_NAME: cache}).logits[:, -1]
    for prompt, last, found in zip(prompts, step["input_ids"].tolist(), logits, strict=True):
        torch.testing.assert_close(found, oracle.logits(prompt, last, prompt=prompt)[-1], **CLOSE)


PICKS: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([3, 2, 2, 0])), [3, 2, 2, 0]),
    "fewer": (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
    "more": (lambda cache: cache.batch_select_indices(torch.tensor([1, 1, 0, 2, 3, 3])), [1, 1, 0, 2, 3, 3]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
    "twice": (lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices([0, 3, 7])), [0, 1, 3]),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", PICKS)
def test_rows_picked_repeated_and_dropped_go_on_from_their_thoughts(
    pair: Pair, model: PeftModel, oracle: Oracle, way: str, side: str
) -> None:
    batch, (pick, rows) = pair.batch(QUESTIONS, side), PICKS[way]
    cache = prefilled(model, batch)[CACHE_NAME]
    pick(cache)
    prompts = [pair.rows(QUESTIONS)[row] for row in rows]
    step = one_more({name: value[rows] for name, value in batch.items()}, torch.arange(7, 7 + len(rows))[:, None])
    check_next(oracle, model, prompts, step, cache)


def saved(value: Any) -> Any:
    torch.save(value, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize(
    "copied",
    [saved, copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c))],
    ids=["saved", "deep", "shallow", "pickled"],
)
def test_saved_and_copied_caches_go_on_from_the_thoughts(
    pair: Pair, model: PeftModel, oracle: Oracle, copied: Callable[[Any], Any], kind: Any, side: str
) -> None:
    batch, size = pair.batch(QUESTIONS, side), {"max_cache_len": 99} if kind is StaticCache else {}
    cache = prefilled(model, batch, **{CACHE_NAME: kind(config=model.get_base_model().config, **size)})[CACHE_NAME]
    assert type(cache) is kind
    check_next(oracle, model, pair.rows(QUESTIONS), one_more(batch, torch.full((4, 1), 9)), copied(cache))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_go_on_with_their_mask(pair: Pair, model: PeftModel, side: str) -> None:
    batch = pair.batch(QUESTIONS, side)
    cache, token = prefilled(model, batch)[CACHE_NAME], torch.full((4, 1), 7)
    length = batch["input_ids"].shape[1]
    for mask, found in ((None, "none"), (torch.ones(4, 1), "(4, 1)"), (torch.ones(4, 1, 1, 60), "(4, 1, 1, 60)")):
        words = (
            f"`attention_mask` must be the padding mask of all tokens so far, (batch, {length} and more), got {found}."
        )
        with pytest.raises(ValueError, match=re.escape(words)):
            model(token, attention_mask=mask, **{CACHE_NAME: cache})


@pytest.mark.parametrize("kind", ["one column", "several columns", "a run"])
def test_going_on_from_labelled_rows(pair: Pair, model: PeftModel, oracle: Oracle, kind: str) -> None:
    texts = QUESTIONS if kind != "a run" else [text + "<thought>" * N for text in QUESTIONS]
    batch = pair.batch(texts, "left" if kind == "one column" else "right")
    ends = batch["attention_mask"].shape[1] - batch["attention_mask"].flip(1).argmax(1)  # of the rows
    answers = torch.full((4, 2), 11)
    full = {
        "input_ids": torch.cat([batch["input_ids"], answers], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(4, 2).long()], 1),
    }
    labels = torch.full_like(full["input_ids"], -100)
    labels[:, -2:] = 11
    if kind == "several columns":
        labels[torch.arange(labels.shape[1]) >= ends[:, None] - 1] = 11
    with torch.no_grad():
        cache = model(**full, labels=labels, use_cache=True)[CACHE_NAME]
    step = one_more(full, torch.full((4, 1), 9))
    if kind == "several columns":
        with pytest.raises(ValueError, match=f"`{CACHE_NAME}` must come from prompts without labels.*one by one"):
            model(**step, **{CACHE_NAME: cache})
        return
    if kind == "one column":
        step["input_ids"] = torch.cat([answers, step["input_ids"]], 1)
        cache.crop(-2)
    with torch.no_grad():
        found = model(**step, **{CACHE_NAME: cache}).logits[:, -1]
    for row, logits in zip(pair.rows(QUESTIONS), found, strict=True):
        torch.testing.assert_close(logits, oracle.logits(row, [11, 11, 9], prompt=row)[-1], **CLOSE)


def test_a_cache_that_was_emptied_forgets_its_thoughts(pair: Pair, model: PeftModel) -> None:
    config, batch = model.get_base_model().config, pair.batch(QUESTIONS[:1])
    cache = prefilled(model, batch, **{CACHE_NAME: StaticCache(config=config, max_cache_len=99)})[CACHE_NAME]
    cache.reset()
    with model.disable_adapter():
        model(**batch, **{CACHE_NAME: cache})
    cache.reset()
    prefilled(model, batch, **{CACHE_NAME: cache})
    cache.reset()
    model.generate(**pair.batch(QUESTIONS[1:2]), **{CACHE_NAME: cache}, max_new_tokens=2)
    with pytest.raises(ValueError, match=f"`{CACHE_NAME}` must come from a call of the model with thoughts"):
        model(torch.tensor([[7]]), **{CACHE_NAME: cache})


def test_a_cache_can_be_cropped_back_to_the_thoughts_and_no_further(
    pair: Pair, model: PeftModel, oracle: Oracle
) -> None:
    (prompt,) = pair.rows(QUESTIONS[:1])
    batch = pair.batch(QUESTIONS[:1])
    cache = prefilled(model, batch)[CACHE_NAME]
    with torch.no_grad():
        model(input_ids=torch.tensor([[7, 8]]), **{CACHE_NAME: cache})
        cache.crop(-2)
        logits = model(input_ids=torch.tensor([[9]]), **{CACHE_NAME: cache}).logits[0, -1]
    torch.testing.assert_close(logits, oracle.logits(prompt, [9], prompt=prompt)[-1], **CLOSE)
    cache.crop(-2)
    with pytest.raises(ValueError, match=rf"`{CACHE_NAME}` must hold all thoughts, but was cropped to \d+"):
        model(input_ids=torch.tensor([[9]]), **{CACHE_NAME: cache})


def test_a_cache_that_was_reset_starts_anew(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    cache = prefilled(model, pair.batch(QUESTIONS[:1]))[CACHE_NAME]
    cache.crop(-cache.get_seq_length())
    (prompt,) = pair.rows(QUESTIONS[1:2])
    found = prefilled(model, pair.batch(QUESTIONS[1:2]), **{CACHE_NAME: cache}).logits[0, -1]
    torch.testing.assert_close(found, oracle.logits(prompt, [])[-1], **CLOSE)


def test_a_cache_with_thoughts_is_refused_while_adapters_are_disabled(pair: Pair, model: PeftModel) -> None:
    batch = pair.batch(QUESTIONS)
    cache = prefilled(model, batch)[CACHE_NAME]
    token = one_more(batch, torch.tensor([[7], [8], [9], [10]]))
    with model.disable_adapter(), pytest.raises(ValueError, match=rf"`{CACHE_NAME}`.*'default'.*disabled now"):
        model(**token, **{CACHE_NAME: cache})
    with model.disable_adapter(), torch.no_grad():  # and one of its own goes on
        plain = pair.load_base()
        expected = plain(**token, **{CACHE_NAME: plain(**batch, use_cache=True)[CACHE_NAME]}).logits
        own = model(**batch, use_cache=True)[CACHE_NAME]
        assert torch.equal(model(**token, **{CACHE_NAME: own}).logits, expected)


def test_a_cache_of_another_adapter_is_refused(pair: Pair, model: PeftModel) -> None:
    model.add_adapter("other", pair.config(num_thought_tokens=2))
    batch = pair.batch(QUESTIONS)
    cache = prefilled(model, batch)[CACHE_NAME]
    model.set_adapter("other")
    with pytest.raises(ValueError, match=rf"`{CACHE_NAME}`.*'default'.*'other' is active now"):
        model(**one_more(batch, torch.tensor([[7], [8], [9], [10]])), **{CACHE_NAME: cache})


def test_a_second_turn_with_a_run_is_refused_on_an_old_cache(pair: Pair, model: PeftModel) -> None:
    first = pair.batch([f"{QUESTIONS[1]}{'<thought>' * N}"])
    second = pair.batch([f"{QUESTIONS[3]}{'<thought>' * N}"])
    cache = prefilled(model, first)[CACHE_NAME]
    with pytest.raises(ValueError, match=f"`{CACHE_NAME}` must not stand before a run of `thought_token`"):
        model(input_ids=second["input_ids"], **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match=f"`{CACHE_NAME}` must be empty"):
        model.generate(**first, **{CACHE_NAME: cache}, max_new_tokens=2)


def test_a_prompt_read_in_chunks_by_hand_warns_and_places_after_the_first(
    pair: Pair, model: PeftModel, oracle: Oracle
) -> None:
    (prompt,) = pair.rows(QUESTIONS[:1])
    with pytest.warns(UserWarning, match="thoughts stand after the last token of each row"), torch.no_grad():
        cache = model(input_ids=torch.tensor([prompt[:6]]), use_cache=True)[CACHE_NAME]
    with torch.no_grad():
        found = model(input_ids=torch.tensor([prompt[6:]]), **{CACHE_NAME: cache}).logits[0]
    expected = oracle.logits(prompt[:6], prompt[6:], prompt=prompt[:6])[6 + N :]
    torch.testing.assert_close(found, expected, **CLOSE)
