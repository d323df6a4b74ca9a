"""Thoughts before a marker in the text: whole texts can be labelled, and training agrees with `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from batches import CLOSE, IGNORED, base_passes, collate, generated, gradients, one_more, step
from helpers import CACHE_NAME, break_assistants, source_of
from oracle import Oracle
from peft import PeftModel
from tiny_pair import QUESTIONS, RUN, Pair
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from softcot_peft import SoftCoTConfig, compute_thoughts, use_thoughts
from softcot_peft.live_rows import LiveRows

N, NEW, MARKER = 4, 8, "\nAnswer:"
ANSWERS = [" Twelve.", " They have twenty eight legs.", " Far, far away", " Five. That is all there is to say of it"]
PROMPTS = [f"Question: {question}{MARKER}" for question in QUESTIONS]
TEXTS = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
LONG_ENDS = [prompt + " so" * number for number, prompt in enumerate(PROMPTS)]  # other columns, however padded
SIDES = pytest.mark.parametrize("side", ["left", "right"])
PASSES = pytest.mark.parametrize("two", [True, False], ids=["two passes", "one pass"])


@pytest.fixture(scope="module")
def model(pair: Pair) -> PeftModel:
    return pair.model(response_marker=MARKER)


@pytest.fixture(scope="module")
def oracle(pair: Pair, model: PeftModel) -> Oracle:
    return Oracle.of(model, pair.base, pair.assistant, N)


def divided(pair: Pair, text: str, marker: str = MARKER) -> tuple[list[int], list[int]]:
    """The ids before the marker's last occurrence, token by token, and the others."""
    (ids,) = pair.rows([text])
    whole = pair.tokenizer.decode(ids)
    before = whole[: whole.rindex(marker)]
    place = max(number for number in range(len(ids)) if before.startswith(pair.tokenizer.decode(ids[:number])))
    return ids[:place], ids[place:]


def whole(pair: Pair, side: str = "right", texts: list[str] = TEXTS) -> dict[str, Tensor]:
    """Texts with all of their tokens labelled."""
    return collate([{"input_ids": ids, "labels": ids} for ids in pair.rows(texts)], side)


def expected(pair: Pair, oracle: Oracle, texts: list[str], marker: str = MARKER, new: int = NEW) -> list[list[int]]:
    """The oracle's greedy tokens after texts."""
    parts = [divided(pair, text, marker) for text in texts]
    return [oracle.generate(before, new, after) for before, after in parts]


# Training


@PASSES
@SIDES
def test_whole_texts_are_trained_on_what_follows_the_thoughts(
    pair: Pair, oracle: Oracle, side: str, two: bool
) -> None:
    model = pair.model(response_marker=MARKER, two_pass_training=two).train()
    want = oracle.mean_loss([divided(pair, text) for text in TEXTS])
    for _ in range(2):  # two passes are tried first
        output = model(**whole(pair, side))
        torch.testing.assert_close(output.loss, want, atol=1e-5, rtol=0)
        assert (output.logits is None) == two
    torch.testing.assert_close(model.eval()(**whole(pair, side)).loss, want, atol=1e-5, rtol=0)


@PASSES
@SIDES
def test_labels_before_the_marker_change_nothing(pair: Pair, side: str, two: bool) -> None:
    model = pair.model(response_marker=MARKER, two_pass_training=two).train()
    full, masked = whole(pair, side), whole(pair, side)
    for row, text in enumerate(TEXTS):
        first = int(full["attention_mask"][row].int().argmax())
        masked["labels"][row, : first + len(divided(pair, text)[0])] = IGNORED
    (one, gradient), (other, wanted) = step(model, full), step(model, masked)
    torch.testing.assert_close(one.loss, other.loss)
    torch.testing.assert_close(gradient, wanted)
    plain = pair.model(two_pass_training=two).train()
    torch.testing.assert_close(plain(**masked).loss, one.loss)  # where automatic placement has them, too


@PASSES
def test_the_divisor_of_a_trainer_counts_the_labels_that_are_left(pair: Pair, two: bool) -> None:
    """Of a whole step; `Trainer` does not count the first token, which nothing predicts."""
    model, batch = pair.model(response_marker=MARKER, two_pass_training=two).train(), whole(pair)
    number = int((batch["labels"][:, 1:] != IGNORED).sum())
    want = model(**batch).loss
    for given in (number, torch.tensor(number)):
        torch.testing.assert_close(model(**batch, num_items_in_batch=given).loss, want)
        torch.testing.assert_close(model(**batch, num_items_in_batch=3 * given).loss, want / 3)


@SIDES
def test_labels_that_are_shifted_already(pair: Pair, model: PeftModel, oracle: Oracle, side: str) -> None:
    batch = whole(pair, side)
    labels = batch.pop("labels")
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
    want = oracle.mean_loss([divided(pair, text) for text in TEXTS])
    torch.testing.assert_close(model(**batch, labels=labels, shift_labels=shifted).loss, want, atol=1e-5, rtol=0)


def test_labels_of_the_response_alone(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    """The marker is in the prompt, and may occur in the response again."""
    answer = f" 4{MARKER} 5"
    before, after = divided(pair, PROMPTS[0])
    (response,) = pair.rows([answer])
    ids = before + after + response
    labels = [IGNORED] * len(before + after) + response
    found = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
    torch.testing.assert_close(found, oracle.loss(before, response, after), atol=1e-5, rtol=0)


def test_the_last_of_several_markers_counts_in_a_whole_text(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    texts = [TEXTS[3] + "\n\n" + TEXTS[0], TEXTS[2]]
    want = oracle.mean_loss([divided(pair, text) for text in texts])
    torch.testing.assert_close(model(**whole(pair, texts=texts)).loss, want, atol=1e-5, rtol=0)
    assert generated(model, pair.batch(texts), NEW, do_sample=False) == expected(pair, oracle, texts)


def test_a_row_without_labels_beside_others(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    batch = whole(pair)
    batch["labels"][1] = IGNORED
    want = oracle.mean_loss([divided(pair, text) for text in (TEXTS[0], *TEXTS[2:])])
    torch.testing.assert_close(model(**batch).loss, want, atol=1e-5, rtol=0)


def test_trainer_and_its_collator_for_plain_text(pair: Pair, oracle: Oracle, tmp_path: Path) -> None:
    model = pair.model(response_marker=MARKER)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=4,
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": ids} for ids in pair.rows(TEXTS)],
        eval_dataset=[{"input_ids": ids} for ids in pair.rows(TEXTS)],
        data_collator=DataCollatorForLanguageModeling(pair.tokenizer, mlm=False),
    )
    want = oracle.mean_loss([divided(pair, text) for text in TEXTS])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(want.detach()), abs=1e-5)
    assert trainer.train().training_loss > 0


# Generation


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"repetition_penalty": 1.0001},
    ],
    ids=str,
)
@pytest.mark.parametrize("texts", [PROMPTS, LONG_ENDS], ids=["the marker ends prompts", "other columns"])
@SIDES
def test_generate_continues_after_the_marker(
    pair: Pair, model: PeftModel, oracle: Oracle, side: str, texts: list[str], options: dict[str, Any]
) -> None:
    texts = texts[-1:] if "prompt_lookup_num_tokens" in options else texts
    answers = generated(model, pair.batch(texts, side), NEW, do_sample=False, **options)
    assert answers == expected(pair, oracle, texts)
    assert len({tuple(answer) for answer in answers}) == len(texts)


def test_generate_puts_thoughts_where_training_does(pair: Pair, model: PeftModel) -> None:
    for text, prompt in zip(TEXTS, PROMPTS, strict=True):
        assert divided(pair, text)[0] == divided(pair, prompt)[0]
        full = whole(pair, texts=[text])
        with torch.no_grad():
            scored = model(**full).logits[0]
            (ids,) = pair.rows([prompt])
            first = model.generate(
                torch.tensor([ids]), max_new_tokens=1, output_logits=True, return_dict_in_generate=True
            ).logits[0]
        torch.testing.assert_close(first[0], scored[len(ids) - 1], **CLOSE)


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
@SIDES
def test_every_beam_has_its_own_prompt_s_thoughts(
    pair: Pair, model: PeftModel, oracle: Oracle, side: str, use_cache: bool, options: dict[str, Any]
) -> None:
    options = options | {"max_new_tokens": NEW, "do_sample": False}
    want = []
    embed = oracle.base.get_input_embeddings()
    for before, after in (divided(pair, text) for text in LONG_ENDS):
        with torch.no_grad():
            pieces = [embed(torch.tensor(before)), oracle.thoughts(before), embed(torch.tensor(after))]
            rows = oracle.base.generate(inputs_embeds=torch.cat(pieces)[None], **options).tolist()
        want += [row[: row.index(1) + 1] if 1 in row else row for row in rows]
    batch = pair.batch(LONG_ENDS, side)
    found = model.generate(**batch, use_cache=use_cache, **options)[:, batch["input_ids"].shape[1] :].tolist()
    assert [row[: row.index(1) + 1] if 1 in row else row for row in found] == want


def test_samples_and_equal_rows_share_a_prefill(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    texts = [LONG_ENDS[2]] * 2 + [LONG_ENDS[1]]
    want = expected(pair, oracle, texts)
    with base_passes(model) as rows:
        assert generated(model, pair.batch(texts, "right"), NEW, do_sample=False) == want
    assert rows[0] == 2
    with base_passes(model) as rows:
        batch = pair.batch(LONG_ENDS[1:3])
        found = model.generate(**batch, max_new_tokens=3, do_sample=True, top_k=1, num_return_sequences=2)
    assert rows[:2] == [2, 4]
    assert torch.equal(found[0], found[1])
    width = batch["input_ids"].shape[1]
    assert [found[0, width:].tolist(), found[2, width:].tolist()] == [want[2][:3], want[0][:3]]


def test_a_draft_model_beside(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    draft = pair.load_base()
    for text, want in zip(LONG_ENDS, expected(pair, oracle, LONG_ENDS), strict=True):
        (ids,) = pair.rows([text])
        output = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, assistant_model=draft)
        assert output[0, len(ids) :].tolist() == want


def test_rows_that_have_ended_are_dropped(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    want = expected(pair, oracle, LONG_ENDS, new=30)
    with LiveRows(model) as live:
        assert generated(model, pair.batch(LONG_ENDS), 30, do_sample=False, stopping_criteria=[live]) == want


@SIDES
@pytest.mark.parametrize("texts", [PROMPTS, LONG_ENDS, PROMPTS[:1], LONG_ENDS[-1:]], ids=["ends", "columns", "1", "2"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_a_base_that_is_its_own_source(pair: Pair, texts: list[str], options: dict[str, Any], side: str) -> None:
    """As with a run of thought tokens at the same place, which are the caller's own."""
    source: dict[str, Any] = {"thought_source": "base", "assistant_model_name_or_path": None}
    model = pair.model(**source, response_marker=MARKER)
    judge = pair.model(**source, thought_token="<thought>", placement="thought_token")
    projection, other = (source_of(each).projection for each in (model, judge))
    other.load_state_dict(projection.state_dict())
    source_of(judge).position_token_id = source_of(model).position_token_id
    run = [text.replace(MARKER, "<thought>" * N + MARKER) for text in texts]
    want = [generated(judge, pair.batch([text]), NEW, do_sample=False, **options)[0] for text in run]
    assert generated(model, pair.batch(texts, side), NEW, do_sample=False, **options) == want
    full = [text + " Twelve legs." for text in texts]
    masked = whole(pair, side, [text + " Twelve legs." for text in run])
    ids, mask = masked["input_ids"], masked["labels"] != IGNORED
    thoughts = (ids == pair.tokenizer.convert_tokens_to_ids("<thought>")).int()
    after = (thoughts.cumsum(1) == N) & (thoughts == 0) & mask
    masked["labels"] = ids.where(after, IGNORED)
    for _ in range(2):
        (one, found), (two, wanted) = (
            gradients(model.train(), whole(pair, side, full)),
            gradients(judge.train(), masked),
        )
        torch.testing.assert_close(one.loss, two.loss, atol=1e-5, rtol=0)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


# Scores: forward passes without labels, as evaluation harnesses make them


@SIDES
@pytest.mark.parametrize("keep", [0, 1, 5, 30, torch.tensor([3, 20, -1]), torch.tensor([1, 0])], ids=str)
def test_logits_are_those_after_thoughts(pair: Pair, model: PeftModel, oracle: Oracle, side: str, keep: Any) -> None:
    batch = pair.batch(TEXTS, side)
    width = batch["input_ids"].shape[1]
    with torch.no_grad():
        found = model(**batch, logits_to_keep=keep).logits
        kept = torch.arange(width)[keep if isinstance(keep, Tensor) else slice(-keep, None)]
        assert found.shape[1] == len(kept)
        for row, (text, mask) in enumerate(zip(TEXTS, batch["attention_mask"], strict=True)):
            before, after = divided(pair, text)
            logits = oracle.logits(before, after)
            first = int(mask.int().argmax())
            for column, values in zip(kept.tolist(), found[row], strict=True):
                if mask[column]:
                    token = column - first
                    torch.testing.assert_close(values, logits[token + N * (token >= len(before) - 1)], **CLOSE)


def test_states_and_attentions_have_the_caller_s_columns(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    before, after = divided(pair, TEXTS[1])
    with torch.no_grad():
        output = model(torch.tensor([before + after]), output_hidden_states=True)
        want = oracle.states(before, after).hidden_states[-1][0]
    kept = [*range(len(before) - 1), *range(len(before) + N - 1, len(want))]
    torch.testing.assert_close(output.hidden_states[-1][0], want[kept], **CLOSE)


# Decoding by hand


@SIDES
def test_decoding_by_hand_after_equal_ends(pair: Pair, model: PeftModel, oracle: Oracle, side: str) -> None:
    batch, rows = pair.batch(PROMPTS, side), torch.tensor([2, 0, 0, 3])
    token = torch.tensor([[7], [8], [9], [10]])
    for pick in (torch.arange(4), rows):
        with torch.no_grad():
            cache = model(**batch, use_cache=True, logits_to_keep=1)[CACHE_NAME]
            cache.reorder_cache(pick)
            picked = {name: value[pick] for name, value in batch.items()}
            logits = model(**one_more(picked, token), **{CACHE_NAME: cache}).logits[:, -1]
        for index, last, found in zip(pick.tolist(), token.tolist(), logits, strict=True):
            before, after = divided(pair, PROMPTS[index])
            torch.testing.assert_close(found, oracle.logits(before, after + last)[-1], **CLOSE)


def test_decoding_by_hand_after_other_ends_is_refused(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    batch = pair.batch(LONG_ENDS)
    with torch.no_grad():
        cache = model(**batch, use_cache=True)[CACHE_NAME]
        with pytest.raises(ValueError, match=r"same number of tokens after the thoughts.*run the rows one by one"):
            model(**one_more(batch, torch.full((4, 1), 9)), **{CACHE_NAME: cache})
        for text in LONG_ENDS:
            one = pair.batch([text])
            cache = model(**one, use_cache=True)[CACHE_NAME]
            found = model(**one_more(one, torch.tensor([[9]])), **{CACHE_NAME: cache}).logits[0, -1]
            before, after = divided(pair, text)
            torch.testing.assert_close(found, oracle.logits(before, [*after, 9])[-1], **CLOSE)


# Where the marker is


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        ("How many legs have seven dogs?", "legs have"),  # a token holds the space before it, too
        ("How many legs have seven dogs?", "gs"),  # within a word
        ("What is 3 (.*) 4?\n[a-z]+$ 12", "[a-z]+$"),
        ("Wie viele Äpfel? 😀 Zwölf", "😀"),  # of four tokens
        ("<|user|>How many legs?<|end|><|assistant|>", "<|assistant|>"),
        ("Tom has three\u00a0apples.\r\n\r\nA: ", "\r\nA: "),
    ],
)
def test_markers_are_found_in_the_text(pair: Pair, text: str, marker: str) -> None:
    model = pair.model(response_marker=marker)
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    before, after = divided(pair, text, marker)
    torch.testing.assert_close(model(**whole(pair, texts=[text])).loss, oracle.loss(before, after), atol=1e-5, rtol=0)
    assert generated(model, pair.batch([text]), NEW, do_sample=False) == expected(pair, oracle, [text], marker)


def test_what_is_not_attended_is_not_searched(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    batch = pair.batch([TEXTS[0] + TEXTS[1]])
    start, (before, after) = len(pair.rows(TEXTS[:1])[0]), divided(pair, TEXTS[0])
    batch["attention_mask"][:, start:] = 0
    with torch.no_grad():
        found = model(**batch).logits[0, start - 1]
    torch.testing.assert_close(found, oracle.logits(before, after)[-1], **CLOSE)
    batch["attention_mask"][:, len(before) :] = 0
    with pytest.raises(ValueError, match="does not occur in the text of row 0"):
        model(**batch)


def test_an_assistant_that_shares_the_ids(pair: Pair) -> None:
    model = pair.model(
        assistant_model_name_or_path=str(pair.twin), assistant_shares_tokenizer=True, response_marker=MARKER
    )
    oracle = Oracle.of(model, pair.base, pair.twin, N, same_ids=True)
    assert generated(model, pair.batch(LONG_ENDS), NEW, do_sample=False) == expected(pair, oracle, LONG_ENDS)


def test_a_run_of_thought_tokens_comes_first(pair: Pair) -> None:
    model = pair.model(response_marker=MARKER, thought_token="<thought>")
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    (prompt, tail), run = pair.rows(["How many legs?", f" Well.{MARKER}"]), "<thought>" * N
    batch = pair.batch([f"How many legs?{run} Well.{MARKER}"])
    assert generated(model, batch, NEW, do_sample=False) == [oracle.generate(prompt, NEW, tail)]
    batch = pair.batch([f"How many legs?{run}"])  # needs no marker
    assert generated(model, batch, NEW, do_sample=False) == [oracle.generate(prompt, NEW)]


def test_the_field_is_saved_and_can_be_changed(pair: Pair, oracle: Oracle, tmp_path: Path) -> None:
    model = pair.model(response_marker=MARKER)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pair.load_base(), tmp_path)
    config = loaded.peft_config["default"]
    assert config.response_marker == MARKER
    assert generated(loaded, pair.batch(PROMPTS), NEW, do_sample=False) == expected(pair, oracle, PROMPTS)
    config.response_marker = None
    want = [oracle.generate(row, NEW) for row in pair.rows(PROMPTS)]
    assert generated(loaded, pair.batch(PROMPTS), NEW, do_sample=False) == want


def test_the_field_can_be_set_on_an_adapter_without_a_tokenizer(pair: Pair) -> None:
    twin = {"assistant_model_name_or_path": str(pair.twin), "assistant_shares_tokenizer": True}
    model, judge = pair.model(**twin), pair.model(**twin, response_marker=MARKER)
    model.peft_config["default"].response_marker = MARKER
    assert model(**whole(pair)).loss == judge(**whole(pair)).loss


# Thoughts computed once


@pytest.mark.parametrize("labels", [True, False])
def test_precomputed_thoughts_stand_at_the_same_place(
    pair: Pair, labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pair.model(response_marker=MARKER)
    loss, answers = model(**whole(pair)).loss, generated(model, pair.batch(PROMPTS), NEW, do_sample=False)
    rows = pair.rows(TEXTS)
    use_thoughts(model, compute_thoughts(model)({"input_ids": rows} | ({"labels": rows} if labels else {})))
    break_assistants(monkeypatch, AssertionError("the assistant was run"))
    assert model(**whole(pair)).loss == loss
    assert generated(model, pair.batch(PROMPTS), NEW, do_sample=False) == answers


def test_the_cache_of_a_data_set_depends_on_the_marker(pair: Pair) -> None:
    states = [
        compute_thoughts(pair.model(response_marker=marker)).__reduce__() for marker in (MARKER, "Answer:", None)
    ]
    assert len({repr(state) for state in states}) == 3


# Errors


@pytest.mark.parametrize("labels", [True, False])
def test_a_row_without_the_marker_is_named(pair: Pair, model: PeftModel, labels: bool) -> None:
    texts = [PROMPTS[0], "Question: what else?\nResponse: 4"]
    batch = whole(pair, texts=texts) if labels else pair.batch(texts)
    words = (
        r"`response_marker` must occur in every row, but '\\nAnswer:' does not occur in the text of row 1: "
        r"'Question: what else\?\\nResponse: 4'. Write it"
    )
    with pytest.raises(ValueError, match=words):
        model(**batch)
    with pytest.raises(ValueError, match=words):
        model.generate(**batch)
    with pytest.raises(ValueError, match=words):
        compute_thoughts(model)({"input_ids": pair.rows(texts)})


def test_labels_that_leave_the_place_open_are_refused(pair: Pair, model: PeftModel) -> None:
    batch = whole(pair)
    batch["labels"][1, -9:-5] = IGNORED
    batch["labels"][3, len(divided(pair, TEXTS[3])[0]) + 9] = IGNORED
    with pytest.raises(ValueError, match=r"labels of a row must form one run.*those of row 3 form several"):
        model(**batch)
    batch = whole(pair)
    batch["labels"][2, len(divided(pair, TEXTS[2])[0]) :] = IGNORED
    with pytest.raises(ValueError, match="must stand after the last `response_marker`, but row 2 has its last one"):
        model(**batch)


def test_a_prompt_must_stand_before_the_marker(pair: Pair, model: PeftModel) -> None:
    with pytest.raises(ValueError, match="needs a prompt before its thoughts, but row 1 begins with `response_mark"):
        model(**whole(pair, texts=[TEXTS[0], MARKER + " 4"]))
    with pytest.raises(
        ValueError, match=r"name the text before the response in `SoftCoTConfig\(response_marker=...\)"
    ):
        pair.model()(**whole(pair))


def test_embeddings_alone_have_no_text(pair: Pair, model: PeftModel) -> None:
    (ids,), own = pair.rows(PROMPTS[:1]), torch.tensor([[5] * N])
    embeds = model.get_input_embeddings()(torch.tensor([ids]))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"`input_ids` must be given, since `response_marker=.*` is searched in"):
            call(inputs_embeds=embeds, assistant_input_ids=own)


def test_ids_outside_of_the_vocabulary_are_named(pair: Pair, model: PeftModel) -> None:
    for wrong in (-1, 10**6):
        with pytest.raises(ValueError, match="`input_ids` must lie within the base's vocabulary"):
            model(torch.tensor([[*pair.rows(PROMPTS[:1])[0], wrong]]))


@SIDES
def test_chunks_must_leave_the_thoughts_in_the_last_one(
    pair: Pair, model: PeftModel, oracle: Oracle, side: str
) -> None:
    batch = pair.batch(LONG_ENDS, side)
    width = batch["input_ids"].shape[1]
    ends = [len(divided(pair, text)[1]) for text in LONG_ENDS]
    with pytest.raises(ValueError, match="`prefill_chunk_size` must leave the thoughts in the last chunk, got 5 for"):
        model.generate(**batch, prefill_chunk_size=5)
    for size in range(width - max(ends) - 1, width + 2):
        fits = (width - 1) // size * size < width - max(ends)
        if fits:
            found = generated(model, batch, NEW, do_sample=False, prefill_chunk_size=size)
            assert found == expected(pair, oracle, LONG_ENDS)
        else:
            with pytest.raises(ValueError, match="`prefill_chunk_size` must leave the thoughts"):
                model.generate(**batch, prefill_chunk_size=size)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"response_marker": ""}, ValueError, "`response_marker` must be a text that introduces the response"),
        ({"response_marker": ["A:"]}, TypeError, "`response_marker` must be a string, got list"),
        (
            RUN | {"response_marker": "A:"},
            ValueError,
            "`response_marker='A:'` contradicts `placement='thought_token'`",
        ),
    ],
)
def test_configs_that_cannot_be(changes: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        SoftCoTConfig(assistant_model_name_or_path="org/assistant", **changes)
