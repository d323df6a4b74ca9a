"""Thoughts that were computed once: the same training without the assistant, and no stale ones."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import shutil
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from batches import IGNORED, collate, gradients, labelled, responses_of
from helpers import assistant_of, assistant_reads, backbone_of, break_assistants, is_loaded, source_of, tokenizer_state
from peft import PeftModel
from project_files import process_environment
from tiny_pair import ANSWERS, QUESTIONS, RUN, Pair
from torch import Tensor, nn
from trainers import SETTINGS, losses
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizer, Trainer, TrainingArguments

from softcot_peft import compute_thoughts, use_assistant, use_thoughts

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("nothing_given")
N = 4
KINDS = {
    "automatic": {},
    "run": RUN,
    "chatting": {"assistant_prompt": "Hint in {num_thought_tokens}: {prompt}", "chat": True},
    "shared ids": {"twin": True},
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def make_model(pair: Pair, kind: str = "automatic", **changes: Any) -> PeftModel:
    """A model in training mode."""
    changes = KINDS[kind] | changes
    for name, folder in (("chat", pair.chat_assistant), ("twin", pair.twin)):
        if changes.pop(name, False):
            changes["assistant_model_name_or_path"] = str(folder)
    return pair.model(**changes).train()


def examples(pair: Pair, kind: str = "automatic", num: int = N) -> list[dict[str, list[int]]]:
    """Labelled rows; a run stands within the prompt."""
    run = [pair.tokenizer.convert_tokens_to_ids("<thought>")] * num + [7, 8] if kind == "run" else []
    return labelled(pair.rows(QUESTIONS), responses_of(pair, ANSWERS), run)


def data(rows: list[dict[str, Any]]) -> Any:
    return datasets.Dataset.from_list(rows)


def computed(model: nn.Module, rows: list[dict[str, Any]], batch_size: int = 16, **options: Any) -> Any:
    return data(rows).map(compute_thoughts(model, **options), batched=True, batch_size=batch_size)


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    output, found = gradients(model, batch)
    return output.loss.detach(), found


@contextmanager
def no_assistant(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing can load the weights of an assistant, nor run one."""
    with monkeypatch.context() as patch:
        break_assistants(patch, AssertionError("the assistant was needed"), loading=True)
        yield


# The same training


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_plain_run_and_the_assistant_is_not_needed(
    kind: str, side: str, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = make_model(pair, kind), examples(pair, kind)
    batch = collate(rows, side)
    plain, gradients = loss_and_gradients(model, batch)
    other = loss_and_gradients(model, collate(rows[:1]))
    thoughts = computed(model, rows, batch_size=3)
    use_thoughts(model, thoughts)
    with no_assistant(monkeypatch):
        loss, found = loss_and_gradients(model, batch)
        alone = loss_and_gradients(model, collate(rows[:1]))
        swapped = loss_and_gradients(model, collate(rows[::-1], side))
    assert gradients[0].abs().max() > 1e-3
    for one, two in ((plain, loss), (plain, swapped[0]), (other[0], alone[0])):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    for one, two in zip(gradients * 2 + other[1], found + swapped[1] + alone[1], strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_states_of_the_same_batch_are_bit_equal(dtype: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_model(pair, assistant_dtype=dtype), examples(pair)
    batch = collate(rows)
    plain, gradients = loss_and_gradients(model, batch)
    thoughts = computed(model, rows)
    kept = "float32" if dtype == "bfloat16" else dtype
    assert thoughts.features["assistant_hidden_states"].feature.dtype == kept
    use_thoughts(model, thoughts)
    with no_assistant(monkeypatch):
        loss, found = loss_and_gradients(model, batch)
    assert torch.equal(loss, plain)
    assert all(map(torch.equal, found, gradients))


def test_other_thoughts_would_change_the_loss(pair: Pair) -> None:
    model, rows = make_model(pair), examples(pair)
    plain = model(**collate(rows)).loss
    thoughts = compute_thoughts(model)({name: [row[name] for row in rows] for name in rows[0]})
    thoughts["assistant_hidden_states"] = thoughts["assistant_hidden_states"][::-1].copy()
    use_thoughts(model, thoughts)
    assert (model(**collate(rows)).loss - plain).abs() > 1e-3


@pytest.mark.parametrize("how", ["completion_mask", "assistant_masks", "padded", "tensors", "prompt_ids", "prompts"])
def test_where_the_prompt_ends_is_read_from_the_columns_that_there_are(how: str, pair: Pair) -> None:
    model, rows = make_model(pair), examples(pair)
    expected = computed(model, rows)
    ends = [row["labels"].count(IGNORED) for row in rows]
    masks = [[0] * end + [1] * (len(row["input_ids"]) - end) for row, end in zip(rows, ends, strict=True)]
    ids = [row["input_ids"] for row in rows]
    if how in ("completion_mask", "assistant_masks"):
        columns = {"input_ids": ids, how: masks}
    elif how in ("padded", "tensors"):
        columns = collate(rows, "left")
        if how == "padded":
            columns = {name: tensor.tolist() for name, tensor in columns.items()}
    elif how == "prompt_ids":
        prompts = [row[:end] for row, end in zip(ids, ends, strict=True)]
        columns = {"prompt_ids": prompts, "labels": [[1]] * 4}  # of whatever else there is
    else:
        columns = {"input_ids": [row[:end] for row, end in zip(ids, ends, strict=True)]}
    found = compute_thoughts(model)(columns)
    assert found["thoughts_key"].tolist() == expected["thoughts_key"][:]
    states = torch.tensor(expected["assistant_hidden_states"][:])
    torch.testing.assert_close(torch.tensor(found["assistant_hidden_states"]), states, atol=1e-5, rtol=1e-5)


def test_generate_looks_thoughts_up_too(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(pair).eval()
    batch = pair.batch(QUESTIONS)
    plain = model.generate(**batch, max_new_tokens=5, do_sample=False)
    use_thoughts(model, computed(model, [{"input_ids": row} for row in pair.rows(QUESTIONS)]))
    with no_assistant(monkeypatch):
        assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), plain)


def test_the_callers_own_assistant_input_is_never_looked_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_model(pair), examples(pair)
    own = torch.tensor([[2, 5, 6, 0, 0, 0, 0]] * 4)
    plain = model(**collate(rows), assistant_input_ids=own).loss
    use_thoughts(model, computed(model, rows))
    with assistant_reads(monkeypatch) as shapes:
        assert torch.equal(model(**collate(rows), assistant_input_ids=own).loss, plain)
    assert shapes == [(4, 7)]


# The caller's own assistant input

OWN = [[2, 5, 6, 7, 8], [2, 9], [2, 10, 11, 12, 13, 14, 15], [2, 16, 17]]  # what the assistant reads for each prompt


def with_own(rows: list[dict[str, Any]], own: list[list[int]] = OWN, num: int = N) -> list[dict[str, Any]]:
    """Rows with the column that the assistant reads instead of the prompt."""
    return [row | {"assistant_input_ids": ids + [0] * num} for row, ids in zip(rows, own, strict=True)]


def own_batch(own: list[list[int]] = OWN, num: int = N) -> dict[str, Tensor]:
    """The same, as arguments of the forward."""
    rows = [ids + [0] * num for ids in own]
    width = max(map(len, rows))
    return {
        "assistant_input_ids": torch.tensor([[1] * (width - len(row)) + row for row in rows]),
        "assistant_attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 16])
def test_own_input_trains_and_answers_as_if_it_were_in_each_batch(
    kind: str, size: int, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = make_model(pair, kind), examples(pair, kind)
    batch, own = collate(rows), own_batch()
    prompts = [{"input_ids": row["input_ids"][: row["labels"].count(IGNORED)]} for row in rows]
    asked = collate([row | {"labels": row["input_ids"]} for row in prompts], "left")
    del asked["labels"]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    plain, expected = loss_and_gradients(model, batch | own)
    answers = model.eval().generate(**asked, **own, **options)
    others = (model.train()(**batch).loss, model(**batch, **own_batch(OWN[::-1])).loss)
    thoughts = datasets.concatenate_datasets(
        [computed(model, with_own(found), batch_size=size) for found in (rows, prompts)]
    )
    use_thoughts(model, thoughts)
    with no_assistant(monkeypatch):
        loss, found = loss_and_gradients(model, batch)
        assert torch.equal(model.eval().generate(**asked, **options), answers)
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=0)
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)
    assert all((other - plain).abs() > 1e-3 for other in others)


def test_own_input_trains_a_trainer_the_same(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, runs = with_own(examples(pair)), []

    def collate_own(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return collate(rows) | own_batch([row["assistant_input_ids"][:-N] for row in rows])

    for cached in (False, True):
        model, train = make_model(pair), data(rows)
        if cached:
            train = computed(model, rows, batch_size=3)
            use_thoughts(model, train)
        options = TrainingArguments(**arguments(tmp_path, remove_unused_columns=False))
        trainer = Trainer(model, options, collate if cached else collate_own, train_dataset=train)
        with no_assistant(monkeypatch) if cached else warnings.catch_warnings():
            trainer.train()
        runs.append(losses(trainer))
    assert runs[1] == pytest.approx(runs[0], abs=1e-5)


@pytest.mark.parametrize("how", ["masks", "padded", "tensors"])
def test_own_input_comes_with_its_mask_or_without(how: str, pair: Pair) -> None:
    model, rows = make_model(pair), examples(pair)
    expected, own = computed(model, with_own(rows)), own_batch()
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    if how == "masks":
        given = [row["assistant_input_ids"] for row in with_own(rows)]
        own = {"assistant_input_ids": given, "assistant_attention_mask": [[1] * len(row) for row in given]}
    elif how == "padded":
        own = {name: tensor.tolist() for name, tensor in own.items()}
    found = compute_thoughts(model)(columns | own)
    for name in ("thoughts_key", "assistant_input_key", "thoughts_fingerprint"):
        assert list(found[name]) == expected[name][:]
    states = torch.tensor(expected["assistant_hidden_states"][:])
    torch.testing.assert_close(torch.tensor(found["assistant_hidden_states"]), states, atol=1e-5, rtol=1e-5)


def test_own_input_is_in_the_fingerprint_and_does_not_mix_with_prompts(pair: Pair) -> None:
    model, rows = make_model(pair), examples(pair)
    given, plain = computed(model, with_own(rows)), computed(model, rows)
    assert json.loads(given["thoughts_fingerprint"][0])["assistant_input"] == "given"
    assert "assistant_input" not in json.loads(plain["thoughts_fingerprint"][0])
    assert given["thoughts_key"][:] == plain["thoughts_key"][:]
    mixed = datasets.concatenate_datasets([given.select([0, 1]), plain.select([2, 3])])
    with pytest.raises(ValueError, match="some were computed from `assistant_input_ids` and some from the prompts"):
        use_thoughts(model, mixed)
    with pytest.raises(ValueError, match=r"differs: `assistant_dtype` was 'auto' and is 'bfloat16'\. Compute"):
        use_thoughts(make_model(pair, assistant_dtype="bfloat16"), given)
    other = given.map(lambda row: {"thoughts_fingerprint": row["thoughts_fingerprint"].replace("given", "guessed")})
    with pytest.raises(ValueError, match="differs: `assistant_input` was 'guessed' and is None"):
        use_thoughts(model, other)
    assert source_of(model).precomputed is None


def test_prompts_without_precomputed_own_input_warn_that_they_are_read_themselves(pair: Pair) -> None:
    model, rows = make_model(pair), examples(pair)
    plain = model(**collate(rows)).loss
    use_thoughts(model, computed(model, with_own(rows)[:2]))
    with pytest.warns(UserWarning, match="lacks thoughts for 2 of 4 .* pass `assistant_input_ids` with them"):
        assert torch.equal(model(**collate(rows)).loss, plain)


@pytest.mark.parametrize("size", [1, 16], ids=["in two batches", "in one batch"])
def test_two_own_inputs_of_a_prompt_are_refused(size: int, pair: Pair) -> None:
    model, rows = make_model(pair), examples(pair)
    same = with_own([*rows, rows[1]], [*OWN, OWN[1]])
    use_thoughts(model, computed(model, same, batch_size=size))
    differ = with_own([*rows, rows[1]], [*OWN, OWN[2]])
    message = "must be the same for the same prompt, .* but rows 1 and 4 have one prompt and two inputs"
    with pytest.raises(ValueError, match=message):
        use_thoughts(make_model(pair), computed(model, differ, batch_size=size))
    columns = {name: [row[name] for row in differ] for name in differ[0]}
    apart = [
        compute_thoughts(model)({name: rows[part] for name, rows in columns.items()})
        for part in (slice(4), slice(4, 5))
    ]
    joined = {name: np.concatenate([columns[name] for columns in apart]) for name in apart[0]}
    with pytest.raises(ValueError, match=message):
        use_thoughts(make_model(pair), joined)


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        ({"assistant_input_ids": [[5, 0, 0, 0]] * 3 + [[0, 0, 0]]}, ValueError, "must attend to the 4 thought pos"),
        ({"assistant_input_ids": [[5, 0, 0, 0, 0]] * 3 + [None]}, ValueError, "for all rows of a data set or for n"),
        ({"assistant_input_ids": [[5, 0, 0, 0, 999]] * 4}, ValueError, "must lie within the assistant's vocabulary"),
        ({"assistant_input_ids": [[5.5, 0, 0, 0, 0]] * 4}, TypeError, r"must hold rows of ids, got \[5.5, 0.0"),
        ({"assistant_input_ids": [5, 0, 0, 0]}, TypeError, r"must hold rows of ids, got 5 in row 0"),
        ({"assistant_attention_mask": [[1] * 5] * 4}, ValueError, "is the mask of `assistant_input_ids`, which is no"),
        (
            {"assistant_input_ids": [[0] * 5, [0] * 6] * 2, "assistant_attention_mask": [[1] * 6, [1] * 5] * 2},
            ValueError, r"`assistant_attention_mask` must be as long .* got \(6,\) and \(5,\) in row 0",
        ),
        (
            {"assistant_input_ids": [[5, 0, 0, 0, 0, 1]] * 4, "assistant_attention_mask": [[1] * 5 + [0]] * 4},
            ValueError, r"must attend to the 4 thought positions .* Pad on the left",
        ),
    ],
)  # fmt: skip
def test_own_input_that_cannot_be_read_is_refused(
    own: dict[str, Any], error: type[Exception], message: str, pair: Pair
) -> None:
    columns = {"input_ids": pair.rows(QUESTIONS)}
    with pytest.raises(error, match=message):
        compute_thoughts(make_model(pair))(columns | own)


def test_a_base_that_reads_for_itself_refuses_own_input(pair: Pair) -> None:
    model = make_model(pair, thought_source="base", assistant_model_name_or_path=None)
    with pytest.raises(ValueError, match="`assistant_input_ids` must not be passed: thought source 'base'"):
        computed(model, with_own(examples(pair)))


def test_settings_that_are_no_longer_there_are_stale_too(pair: Pair) -> None:
    thoughts = computed(make_model(pair, assistant_prefix="seven"), examples(pair))
    with pytest.raises(ValueError, match="differs: `assistant_prefix` was 'seven' and is None"):
        use_thoughts(make_model(pair), thoughts)


# The assistant's weights


def test_thoughts_from_disk_are_used_without_ever_loading_the_assistant(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = make_model(pair), examples(pair)
    plain = model(**collate(rows)).loss.detach()
    computed(model, rows).save_to_disk(tmp_path / "thoughts")
    model.save_pretrained(tmp_path / "adapter")
    del model
    with no_assistant(monkeypatch):
        loaded = PeftModel.from_pretrained(pair.load_base(), tmp_path / "adapter", is_trainable=True).train()
        use_thoughts(loaded, datasets.load_from_disk(tmp_path / "thoughts"))
        torch.testing.assert_close(loaded(**collate(rows)).loss, plain, atol=1e-5, rtol=1e-5)
        loaded.save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_the_assistant_is_released_and_loaded_again_when_needed(pair: Pair) -> None:
    model, rows = make_model(pair), examples(pair)
    assistant = assistant_of(model)
    plain = model(**collate(rows)).loss
    thoughts, backbone = computed(model, rows), weakref.ref(backbone_of(model))
    use_thoughts(model, thoughts)
    gc.collect()
    assert backbone() is None
    model(**collate(rows))
    assert not is_loaded(assistant)
    use_thoughts(model, None)
    assert torch.equal(model(**collate(rows)).loss, plain)
    assert is_loaded(assistant)


def test_a_given_assistant_stays(pair: Pair) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(pair.assistant)
    use_assistant(loaded, AutoTokenizer.from_pretrained(pair.assistant), name="mine")
    model, rows = make_model(pair, assistant_model_name_or_path="mine"), examples(pair)
    use_thoughts(model, computed(model, rows))
    assert backbone_of(model) is loaded.model


# Prompts that are missing


def test_missing_prompts_warn_once_and_are_read_by_the_assistant(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_model(pair), examples(pair)
    plain = model(**collate(rows)).loss
    use_thoughts(model, computed(model, rows[:2]))
    with assistant_reads(monkeypatch) as shapes:
        with pytest.warns(UserWarning, match="lacks thoughts for 2 of 4 prompts of a batch, with 4 thoughts each"):
            loss = model(**collate(rows)).loss
        assert torch.equal(loss, plain)
        model(**collate(rows))  # warnings are errors
        model(**collate(rows[:2]))
    assert [shape[0] for shape in shapes] == [4, 4]


def test_another_number_of_thoughts_is_missing_unless_it_is_there_too(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = make_model(pair, inference_num_thought_tokens=2), examples(pair)
    prompts = [{"input_ids": row["input_ids"][: row["labels"].count(IGNORED)]} for row in rows]
    ids, options = {"input_ids": torch.tensor([prompts[0]["input_ids"]])}, {"max_new_tokens": 3, "do_sample": False}
    plain = model.eval().generate(**ids, **options)
    use_thoughts(model, computed(model, rows))
    with pytest.warns(UserWarning, match="1 of 1 prompts of a batch, with 2 thoughts each"):
        assert torch.equal(model.generate(**ids, **options), plain)
    both = datasets.concatenate_datasets([computed(model, rows), computed(model, prompts, num_thought_tokens=2)])
    use_thoughts(model, both)
    with no_assistant(monkeypatch):
        assert torch.equal(model.generate(**ids, **options), plain)
        model(**collate(rows))
        model.train()(**collate(rows))


def test_runs_of_any_length_are_looked_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(pair, "run")
    short, long = examples(pair, "run", 2), examples(pair, "run", 7)
    plain = [model(**collate(rows)).loss for rows in (short, long)]
    use_thoughts(model, datasets.concatenate_datasets([computed(model, rows) for rows in (short, long)]))
    with no_assistant(monkeypatch):
        found = [model(**collate(rows)).loss for rows in (short, long)]
    assert all(map(torch.equal, plain, found))


# Stale thoughts


def copied(folder: Path, to: Path, change: Callable[[Path], None]) -> str:
    """A copy of an assistant's folder, with its name, and one thing changed."""
    shutil.copytree(folder, to / folder.name)
    change(to / folder.name)
    return str(to / folder.name)


def retrain(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1e-3
    model.save_pretrained(folder)


def rename_token(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"apples"', '"apricots"'))


def reconfigure(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.5}))


def new_chat(folder: Path) -> None:
    for file in (folder / "chat_template.jinja", folder / "tokenizer_config.json"):
        if file.exists():
            file.write_text(file.read_text().replace("[assistant]", "[helper]"))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("assistant", {"assistant_model_name_or_path": "chat_assistant"}),
        ("assistant_weights", {"assistant_model_name_or_path": retrain}),
        ("assistant_config", {"assistant_model_name_or_path": reconfigure}),
        ("assistant_tokenizer", {"assistant_model_name_or_path": rename_token}),
        ("assistant_dtype", {"assistant_dtype": "bfloat16"}),
        ("assistant_prompt", {"assistant_prompt": "Hint: {prompt}"}),
        ("assistant_thought_token_id", {"assistant_thought_token": "[EOS]"}),
        ("num_thought_tokens", {"num_thought_tokens": 5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stale_data_set_is_refused_by_what_differs(
    field: str, change: dict[str, Any], pair: Pair, tmp_path: Path
) -> None:
    rows = examples(pair)
    thoughts = computed(make_model(pair), rows)
    for name, value in change.items():
        if callable(value):
            change = change | {name: copied(pair.assistant, tmp_path, value)}
        elif value == "chat_assistant":
            change = change | {name: str(pair.chat_assistant)}
    model = make_model(pair, **change)
    with pytest.raises(ValueError, match=rf"what they were computed with differs: .*`{field}` was .* and is "):
        use_thoughts(model, thoughts)
    assert source_of(model).precomputed is None
    use_thoughts(model, computed(model, rows))


def test_what_a_call_leaves_in_a_tokenizer_is_not_in_its_state(pair: Pair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    before = tokenizer_state(tokenizer)
    tokenizer(QUESTIONS, padding=True, truncation=True, max_length=5)
    assert tokenizer_state(tokenizer) == before
    assert b"apples" in before
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_state(tokenizer) != before
    sentence = PreTrainedTokenizer.__new__(PreTrainedTokenizer)
    vocabulary = {"a": 0}
    sentence.get_vocab = sentence.get_added_vocab = lambda: vocabulary  # one that is all Python
    before = tokenizer_state(sentence)
    vocabulary["b"] = 1
    assert tokenizer_state(sentence) != before


def test_a_copied_folder_is_not_stale(pair: Pair, tmp_path: Path) -> None:
    thoughts = computed(make_model(pair), examples(pair))
    folder = copied(pair.assistant, tmp_path, lambda path: (path / "config.json").touch())
    use_thoughts(make_model(pair, assistant_model_name_or_path=folder), thoughts)


def test_another_chat_template_or_way_of_reading_is_stale(pair: Pair, tmp_path: Path) -> None:
    rows = examples(pair)
    folder = copied(pair.chat_assistant, tmp_path, new_chat)
    thoughts = computed(make_model(pair, "chatting"), rows)
    with pytest.raises(ValueError, match="differs: `assistant_chat_template` was"):
        use_thoughts(make_model(pair, "chatting", chat=False, assistant_model_name_or_path=folder), thoughts)
    thoughts = computed(make_model(pair, "shared ids"), rows)
    with pytest.raises(ValueError, match=r"differs: `assistant_tokenizer` was None .*`base_tokenizer` was None"):
        use_thoughts(make_model(pair, "shared ids", assistant_shares_tokenizer=False), thoughts)


def test_a_commit_of_the_hub_is_in_the_fingerprint(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_model(pair), examples(pair)
    thoughts = computed(model, rows)
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    monkeypatch.setattr(assistant_of(model), "revision", "abc")
    with pytest.raises(ValueError, match="`assistant_commit` was None and is 'abc'"):
        use_thoughts(model, thoughts)


def test_a_given_assistant_that_was_trained_is_stale(pair: Pair) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(pair.assistant)
    use_assistant(loaded, AutoTokenizer.from_pretrained(pair.assistant), name="mine")
    model, rows = make_model(pair, assistant_model_name_or_path="mine"), examples(pair)
    thoughts = computed(model, rows)
    use_thoughts(model, thoughts)
    with torch.no_grad():
        loaded.model.norm.weight += 1
    with pytest.raises(ValueError, match="differs: `assistant_weights` was"):
        use_thoughts(model, thoughts)
    loaded.config.rms_norm_eps = 0.5
    with pytest.raises(ValueError, match="`assistant_config` was"):
        use_thoughts(model, thoughts)


# datasets' own cache

SCRIPT = """
import sys
from datasets.fingerprint import Hasher
from peft import PeftModel
from transformers import AutoModelForCausalLM
from helpers import reader_of
from softcot_peft import compute_thoughts
base, adapter = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
reader_of(model).base_tokenizer(["a", "b c"], padding=True)
print(Hasher.hash(compute_thoughts(model)))
"""


def test_another_process_finds_the_file_again(pair: Pair, tmp_path: Path) -> None:
    model = make_model(pair)
    model.save_pretrained(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(pair.base), str(tmp_path)]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, env=process_environment()
    ).stdout.strip()
    hasher = datasets.fingerprint.Hasher
    assert found == hasher.hash(compute_thoughts(model))
    assert found != hasher.hash(compute_thoughts(model, 4))
    assert found != hasher.hash(compute_thoughts(make_model(pair, num_thought_tokens=5)))


def test_map_runs_once(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data(examples(pair)).save_to_disk(tmp_path / "data")
    stored = datasets.load_from_disk(tmp_path / "data")
    with assistant_reads(monkeypatch) as shapes:
        first = stored.map(compute_thoughts(make_model(pair)), batched=True, batch_size=2)
        assert len(shapes) == 2
        again = stored.map(compute_thoughts(make_model(pair)), batched=True, batch_size=2)
        assert len(shapes) == 2
        stored.map(compute_thoughts(make_model(pair, num_thought_tokens=5)), batched=True, batch_size=2)
        assert len(shapes) == 4
    assert again.cache_files == first.cache_files != []


def test_workers_of_map_say_what_to_do(pair: Pair) -> None:
    with pytest.raises(RuntimeError, match=r"Call `dataset\.map` without `num_proc`"):
        data(examples(pair)).map(compute_thoughts(make_model(pair)), batched=True, num_proc=2)
    elsewhere = pickle.loads(pickle.dumps(compute_thoughts(make_model(pair))))
    assert pickle.dumps(elsewhere) == pickle.dumps(pickle.loads(pickle.dumps(elsewhere)))


# Data sets that can be read, and that cannot


@pytest.mark.parametrize("how", ["shuffled", "selected", "formatted", "columns", "tensors", "concatenated"])
def test_data_sets_in_any_order_and_format(how: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_model(pair), examples(pair)
    plain, thoughts = model(**collate(rows)).loss, computed(model, rows)
    if how == "shuffled":
        thoughts = thoughts.shuffle(seed=1)
    elif how == "selected":
        thoughts = thoughts.select([3, 1, 0, 2, 1])  # the same prompt twice
    elif how == "formatted":
        thoughts = thoughts.with_format("torch", columns=["input_ids"])
    elif how == "concatenated":
        thoughts = datasets.concatenate_datasets([thoughts.select([2, 3]), thoughts.select([0, 1])])
    else:
        thoughts = compute_thoughts(model)({name: [row[name] for row in rows] for name in rows[0]})
        if how == "tensors":
            shaped = torch.from_numpy(thoughts["assistant_hidden_states"]).view(4, N, -1)
            thoughts |= {
                "assistant_hidden_states": shaped,
                "thoughts_key": torch.from_numpy(thoughts["thoughts_key"]),
                "thoughts_fingerprint": thoughts["thoughts_fingerprint"][0],
            }
    use_thoughts(model, thoughts)
    with no_assistant(monkeypatch):
        assert torch.equal(model(**collate(rows)).loss, plain)


def test_what_is_no_data_set_of_thoughts_is_refused(pair: Pair) -> None:
    model, rows = make_model(pair), examples(pair)
    thoughts = computed(model, rows)
    with pytest.raises(ValueError, match=r"must hold the columns \['assistant_hidden_states', .* got \['input_ids'"):
        use_thoughts(model, data(rows))
    with pytest.raises(ValueError, match=r"must hold the columns .* got \['train'\]"):
        use_thoughts(model, datasets.DatasetDict(train=thoughts))
    with pytest.raises(TypeError, match="must be read in any order, got IterableDataset"):
        use_thoughts(model, thoughts.to_iterable_dataset())
    with pytest.raises(ValueError, match="must hold rows, got none"):
        use_thoughts(model, thoughts.select([]))
    assert source_of(model).precomputed is None


def test_wrong_arguments_are_refused(pair: Pair) -> None:
    model, rows = make_model(pair), examples(pair)
    with pytest.raises(TypeError, match="`num_thought_tokens` must be an integer, got True"):
        compute_thoughts(model, True)
    with pytest.raises(ValueError, match="`num_thought_tokens` must be at least 1, got 0"):
        compute_thoughts(model, 0)
    with pytest.raises(ValueError, match="must have a SoftCoT adapter, got LlamaForCausalLM without one"):
        compute_thoughts(pair.load_base())
    with pytest.raises(TypeError, match="`model` must be a model, got str"):
        use_thoughts("model", None)  # type: ignore[arg-type]
    with model.disable_adapter(), pytest.raises(ValueError, match="must have an active SoftCoT adapter"):
        use_thoughts(model, None)
    with pytest.raises(TypeError, match=r"must hold rows of ids, got single ids. Pass `batched=True`"):
        data(rows).map(compute_thoughts(model))
    with pytest.raises(ValueError, match=r"`input_ids` must be a column, got \['text'\]"):
        compute_thoughts(model)({"text": ["one"]})
    with pytest.raises(ValueError, match="must be the length of the run in the prompts, 4, got 3"):
        computed(make_model(pair, "run"), examples(pair, "run"), num_thought_tokens=3)


# Adapters, copies, routes


def test_each_adapter_has_its_own(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_model(pair), examples(pair)
    model.add_adapter("other", pair.config(num_thought_tokens=3))
    plain = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        plain[name] = model(**collate(rows)).loss
    use_thoughts(model, computed(model, rows))
    with no_assistant(monkeypatch):
        assert torch.equal(model(**collate(rows)).loss, plain["other"])
    model.set_adapter("default")
    with assistant_reads(monkeypatch) as shapes:
        assert torch.equal(model(**collate(rows)).loss, plain["default"])
    assert len(shapes) == 1
    model.delete_adapter("other")
    model.add_adapter("other", pair.config(num_thought_tokens=3))
    assert source_of(model, "other").precomputed is None


def test_a_bare_base_with_an_injected_adapter(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(pair).save_pretrained(tmp_path)
    base, rows = pair.load_base(), examples(pair)
    base.load_adapter(tmp_path)
    plain = base(**collate(rows)).loss
    use_thoughts(base, computed(base, rows))
    with no_assistant(monkeypatch):
        assert torch.equal(base(**collate(rows)).loss, plain)


def test_an_offloaded_base(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_model(pair).eval(), examples(pair)
    plain = model(**collate(rows)).loss
    cpu_offload(model, torch.device("cpu"))
    use_thoughts(model, computed(model, rows))
    with no_assistant(monkeypatch):
        assert torch.equal(model(**collate(rows)).loss, plain)


def test_copies_share_the_data_set_and_pickles_leave_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_model(pair), examples(pair)
    plain = model(**collate(rows)).loss
    use_thoughts(model, computed(model, rows))
    twin = copy.deepcopy(model)
    assert source_of(twin).precomputed is source_of(model).precomputed
    use_thoughts(model, None)
    with no_assistant(monkeypatch):
        assert torch.equal(twin(**collate(rows)).loss, plain)
    other = pickle.loads(pickle.dumps(twin))
    assert source_of(other).precomputed is None
    assert torch.equal(other(**collate(rows)).loss, plain)


# Trainers


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    own = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 3e-2, "lr_scheduler_type": "linear"}
    return SETTINGS | {"output_dir": str(folder)} | own | changes


@pytest.mark.parametrize("mapped", [False, True], ids=["the data as before", "the mapped data"])
@pytest.mark.parametrize("kind", ["automatic", "run"])
def test_trainer(kind: str, mapped: bool, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = examples(pair, kind)
    runs = []
    for cached in (False, True):
        model = make_model(pair, kind)
        train = data(rows)
        if cached:
            thoughts = computed(model, rows)
            use_thoughts(model, thoughts)
            train = thoughts if mapped else train
        options = TrainingArguments(**arguments(tmp_path))
        trainer = Trainer(model, options, collate, train_dataset=train, eval_dataset=train)
        with no_assistant(monkeypatch) if cached else warnings.catch_warnings():
            trainer.train()
            runs.append([*losses(trainer), trainer.evaluate()["eval_loss"]])
    assert runs[1] == pytest.approx(runs[0], abs=1e-5)
    assert runs[0][-1] < runs[0][0]


# TRL 1.16 turns it on by default, under the name that transformers 5.23 renames
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Gradient checkpointing turns two-pass training off:UserWarning")
def test_sft_trainer(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl")
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    runs = []
    for cached in (False, True):
        torch.manual_seed(0)
        trainer = trl.SFTTrainer(
            model=pair.load_base(),
            peft_config=pair.config(),
            processing_class=pair.tokenizer,
            # all rows in a step, so that losses of different steps can be compared
            args=trl.SFTConfig(**arguments(tmp_path, bf16=False, per_device_train_batch_size=4)),
            train_dataset=data(rows),
        )
        if cached:
            thoughts = trainer.train_dataset.map(compute_thoughts(trainer.model), batched=True, batch_size=3)
            use_thoughts(trainer.model, thoughts)
        with no_assistant(monkeypatch) if cached else warnings.catch_warnings():
            trainer.train()
        runs.append(losses(trainer))
    assert runs[1] == pytest.approx(runs[0], abs=1e-5)
    assert runs[0][-1] < runs[0][0]
