"""`examples/evaluate.py`: every task from its data to the table, with a tiny pair; what is logged is what is true."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import reader_of
from peft import LoraConfig, PeftModel, get_peft_model
from project_files import EXAMPLES, load_example, load_script
from small_data import DATA, needs_data, write_data
from tiny_pair import QUESTIONS, Pair

from softcot_peft import with_thought_tokens
from softcot_peft.analysis import majority_vote

pytest.importorskip("lm_eval")
pytest.importorskip("scipy")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

sys.path += [str(EXAMPLES), str(EXAMPLES.parent)]
from evaluation import answers

# By its path, since a library that lm-evaluation-harness installs is called `evaluate`, too.
evaluate = load_script(EXAMPLES / "evaluate.py", "evaluate_script", known=True)
NEW = 6
N = 4


@pytest.fixture(autouse=True)
def _no_report_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-evaluation-harness runs some ten programs to describe the machine, which takes seconds for each score."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def adapter(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter beside a tokenizer whose chat template writes the run at the end of the user's turn."""
    folder = tmp_path_factory.mktemp("adapter")
    model = pair.model(thought_token="<thought>", placement="thought_token")
    model.save_pretrained(folder)
    with_thought_tokens(pair.tokenizer, model.peft_config["default"]).save_pretrained(folder)
    return folder


def run(pair: Pair, data: Path, out: Path, *options: str) -> dict[str, Any]:
    evaluate.main(
        [
            *("--base", str(pair.base), "--data-dir", str(data), "--output-dir", str(out), "--no-bf16"),
            *("--max-new-tokens", str(NEW), "--batch-size", "2", *options),
        ]
    )
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def logged(out: Path, task: str, system: str) -> list[dict[str, Any]]:
    """What the harness wrote about one score, first samples only."""
    (file,) = out.glob(f"scores/{task}_{system}_*/logs/**/samples_*.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["filter"] == "first"]


def direct(pair: Pair, adapter: Path, prompts: list[str], disabled: bool) -> list[str]:
    """What plain `generate` writes after each prompt alone."""
    model, texts = PeftModel.from_pretrained(pair.load_base(), adapter).eval(), []
    for prompt in prompts:
        ids = pair.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad(), model.disable_adapter() if disabled else torch.no_grad():
            new = model.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, ids["input_ids"].shape[1] :]
        texts.append(pair.tokenizer.decode(new, skip_special_tokens=True))
    return texts


def test_every_task_runs_and_the_harness_logs_what_generate_writes(
    pair: Pair, data: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(pair, data, tmp_path, "--adapter", str(adapter))
    assert {score["task"] for score in results["scores"]} == set(evaluate.TASKS)
    for task in evaluate.TASKS:
        for system, thoughts in (("SoftCoT", N), ("base", 0)):
            rows = logged(tmp_path, task, system)
            prompts = [row["arguments"]["gen_args_0"]["arg_0"] for row in rows]
            assert all(prompt.endswith("<thought>" * thoughts + "<|end|><|assistant|>") for prompt in prompts)
            assert all(prompt.count("<thought>") == thoughts for prompt in prompts)
            written = [row["resps"][0][0] for row in rows]
            assert written == direct(pair, adapter, prompts, disabled=system == "base")
            (score,) = [s for s in results["scores"] if (s["task"], s["system"]) == (task, system)]
            ordered = sorted(rows, key=lambda row: row["doc_id"])
            assert score["right"]["first"] == [int(row["filtered_resps"] == [row["target"]]) for row in ordered]
    assert (tmp_path / "results.md").read_text(encoding="utf-8").strip() in capsys.readouterr().out


def test_what_is_found_is_kept_and_other_settings_are_found_anew(
    pair: Pair, data: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--adapter", str(adapter), "--tasks", "strategyqa")
    first = run(pair, data, tmp_path, *options)
    asked: list[Any] = []
    score = evaluate.Evaluation.score

    def count(self: Any, question: Any, folder: Path) -> Any:
        asked.append(question)
        return score(self, question, folder)

    monkeypatch.setattr(evaluate.Evaluation, "score", count)
    assert run(pair, data, tmp_path, *options) == first
    assert asked == []
    run(pair, data, tmp_path, *options, "--limit", "2")
    assert [question.system for question in asked] == ["base", "SoftCoT"]


def test_controls_change_what_is_written_and_nothing_else(
    pair: Pair, data: Path, adapter: Path, tmp_path: Path
) -> None:
    tasks = ("aqua", "gsm8k", "date_understanding")  # random models may write the same answer to a few questions
    run(
        pair,
        data,
        tmp_path,
        "--adapter",
        str(adapter),
        "--tasks",
        ",".join(tasks),
        "--controls",
        "--batch-size",
        "3",
        "--max-new-tokens",
        "24",
    )
    names = ("SoftCoT", "zero-vectors", "another-questions", "random-projection", "average")
    rows = {name: [row for task in tasks for row in logged(tmp_path, task, name)] for name in names}
    prompts = {name: [row["arguments"]["gen_args_0"]["arg_0"] for row in found] for name, found in rows.items()}
    assert all(found == prompts["SoftCoT"] for found in prompts.values())
    written = [tuple(row["resps"][0][0] for row in found) for found in rows.values()]
    assert len(set(written)) == len(names)


def test_samples_vote_and_seeds_differ(pair: Pair, data: Path, tmp_path: Path) -> None:
    options = ("--tasks", "gsm8k", "--samples", "3", "--temperature", "1.5", "--seeds", "1,2")
    scores = run(pair, data, tmp_path, *options)["scores"]
    assert [score["seed"] for score in scores] == [1, 2]
    assert all(set(score["right"]) == {"first", "vote of 2", "vote of 3"} for score in scores)
    texts = [row["resps"][0] for row in logged_any(tmp_path)]
    assert all(len(set(drawn)) == 3 for drawn in texts)  # no sample is another's copy
    assert run(pair, data, tmp_path / "again", *options)["scores"] == scores


def logged_any(out: Path) -> list[dict[str, Any]]:
    files = sorted(out.glob("scores/*/logs/**/samples_*.jsonl"))
    assert len(files) == 2
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["filter"] == "first"]


K = 3


@pytest.fixture(scope="module")
def chains(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with several chains, whose answers differ."""
    folder = tmp_path_factory.mktemp("chains")
    pair.model(num_chains=K).save_pretrained(folder)
    return folder


def by_chain(pair: Pair, folder: Path, prompts: list[str], chain: int) -> list[str]:
    """What plain `generate` writes after each prompt alone with a chain's thoughts."""
    model, texts = PeftModel.from_pretrained(pair.load_base(), folder).eval(), []
    for prompt in prompts:
        ids = pair.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            new = model.generate(**ids, max_new_tokens=NEW, do_sample=False, chains=chain)[0]
        texts.append(pair.tokenizer.decode(new[ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("chosen", [None, [2, 0], [1]], ids=str)
def test_chains_answer_in_turn_and_vote(
    pair: Pair, data: Path, chains: Path, tmp_path: Path, chosen: list[int] | None
) -> None:
    options = ["--adapter", str(chains), "--tasks", "aqua,gsm8k"]
    options += ["--chains", ",".join(map(str, chosen))] if chosen else []
    chosen = chosen or [*range(K)]
    results = run(pair, data, tmp_path, *options)
    for task in ("aqua", "gsm8k"):
        (base, score) = (s for s in results["scores"] if s["task"] == task)
        assert (base["system"], set(base["right"])) == ("base", {"first"})
        rows = sorted(logged(tmp_path, task, "SoftCoT"), key=lambda row: row["doc_id"])
        prompts = [row["arguments"]["gen_args_0"]["arg_0"] for row in rows]
        wanted = [*zip(*(by_chain(pair, chains, prompts, chain) for chain in chosen), strict=True)]
        assert [tuple(row["resps"][0]) for row in rows] == wanted
        assert len(chosen) == 1 or any(len(set(texts)) > 1 for texts in wanted)
        read = getattr(answers, "letter" if task == "aqua" else "number")
        for count in range(1, len(chosen) + 1):
            voted = [
                answers_of(read, texts[:count], row["doc"], task) for row, texts in zip(rows, wanted, strict=True)
            ]
            right = [int(answer == row["target"]) for answer, row in zip(voted, rows, strict=True)]
            assert score["right"]["first" if count == 1 else f"vote of {count}"] == right
        assert len(score["right"]) == len(chosen)


def answers_of(read: Any, texts: tuple[str, ...], doc: dict[str, Any], task: str) -> str | None:
    options = (answers.option_texts(doc),) if task == "aqua" else ()
    return majority_vote([read(text, *options) for text in texts])


def test_samples_of_chains_vote_together(pair: Pair, data: Path, chains: Path, tmp_path: Path) -> None:
    options = ("--adapter", str(chains), "--tasks", "gsm8k", "--samples", "2", "--temperature", "1.5")
    options += ("--controls", "--batch-size", "3")
    scores = {score["system"]: score for score in run(pair, data, tmp_path, *options)["scores"]}
    assert set(scores["SoftCoT"]["right"]) == {"first", "vote of 2", "vote of 3", "vote of 5", "vote of 6"}
    assert set(scores["base"]["right"]) == {"first", "vote of 2"}
    assert set(scores["average"]["right"]) == {"first"}
    assert all(len(set(row["resps"][0])) == 2 * K for row in logged(tmp_path, "gsm8k", "SoftCoT"))


def test_answers_of_chains_are_kept_apart_when_an_evaluation_is_interrupted(
    pair: Pair, data: Path, chains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--adapter", str(chains), "--tasks", "gsm8k")
    harness = evaluate.Evaluation.score.__globals__["Harness"]
    generate, asked, last = harness._model_generate, [], []

    def interrupt(self: Any, context: Any, *args: Any, **settings: Any) -> Any:
        asked.append(settings.get("chains"))
        if last == [len(asked)]:
            raise KeyboardInterrupt
        return generate(self, context, *args, **settings)

    monkeypatch.setattr(harness, "_model_generate", interrupt)
    wanted = run(pair, data, tmp_path / "whole", *options)["scores"]
    whole = len(asked)
    assert set(asked) == {None, *range(K)}
    asked.clear()
    last.append(whole)
    with pytest.raises(KeyboardInterrupt):
        run(pair, data, tmp_path / "again", *options)
    asked.clear()
    assert run(pair, data, tmp_path / "again", *options)["scores"] == wanted
    assert asked == [K - 1]  # the last batch alone


def test_a_base_alone_without_a_chat_template_and_with_examples(pair: Pair, data: Path, tmp_path: Path) -> None:
    tokenizer = pair.tokenizer
    plain = tmp_path / "plain"
    pair.load_base().save_pretrained(plain)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(plain)
    tokenizer.chat_template = template
    options = ["--data-dir", str(data), "--output-dir", str(tmp_path / "out"), "--no-bf16", "--max-new-tokens", "4"]
    evaluate.main(["--base", str(plain), "--tasks", "gsm8k", "--num-fewshot", "1", "--limit", "2", *options])
    (row, _) = logged(tmp_path / "out", "gsm8k", "base")
    assert "Answer: " in row["arguments"]["gen_args_0"]["arg_0"]  # the example's solution
    assert row["arguments"]["gen_args_0"]["arg_1"]["until"] == ["\n\n"]


def test_adapters_of_other_methods_are_evaluated_and_have_no_controls(pair: Pair, data: Path, tmp_path: Path) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(pair.load_base(), lora).save_pretrained(tmp_path / "lora")
    options = ("--adapter", str(tmp_path / "lora"), "--tasks", "aqua")
    scores = run(pair, data, tmp_path, *options)["scores"]
    assert [score["system"] for score in scores] == ["base", "LORA"]
    written = [[row["resps"] for row in logged(tmp_path, "aqua", system)] for system in ("base", "LORA")]
    assert written[0] != written[1]
    with pytest.raises(ValueError, match=r"change thoughts, but .* is an adapter of the method LORA"):
        run(pair, data, tmp_path, *options, "--controls")


def test_chains_that_an_adapter_does_not_have(pair: Pair, data: Path, chains: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`--chains` must be below {K}, the number of chains of .*, got 3"):
        run(pair, data, tmp_path, "--adapter", str(chains), "--chains", "1,3")
    (tmp_path / "lora").mkdir()
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(pair.load_base(), lora).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"`--chains` change thoughts, but .* is an adapter of the method LORA"):
        run(pair, data, tmp_path, "--adapter", str(tmp_path / "lora"), "--chains", "0")


def test_other_numbers_of_thoughts(pair: Pair, data: Path, adapter: Path, tmp_path: Path) -> None:
    run(
        pair, data, tmp_path, "--adapter", str(adapter), "--tasks", "aqua", "--inference-thoughts", "2", "--limit", "1"
    )
    assert logged(tmp_path, "aqua", "SoftCoT")[0]["arguments"]["gen_args_0"]["arg_0"].count("<thought>") == 2


@pytest.mark.parametrize(
    ("questions", "size", "processes", "expected"),
    [(9, 4, 1, 3), (8, 4, 1, 4), (3, 4, 1, 4), (10, 4, 2, 3), (11, 7, 2, 7)],
)
def test_no_question_is_left_alone(questions: int, size: int, processes: int, expected: int) -> None:
    assert load_example("harness").batch_size_for(questions, size, processes) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "gsm8k,mmlu"], "`--tasks` must be some of gsm8k, .*got mmlu"),
        (["--samples", "0"], "`--samples` must be at least 1, got 0"),
        (["--samples", "3"], "need sampling, but `--temperature` is 0"),
        (["--seeds", "1,2"], "2 seeds need sampling"),
        (["--controls"], "there is no `--adapter`"),
        (["--inference-thoughts", "2"], "there is no `--adapter`"),
        (["--chains", "0"], "there is no `--adapter`"),
        (["--chains", "0,1,0", "--adapter", "x"], "`--chains` must be different numbers from 0, got 0, 1, 0"),
        (["--chains", "-1", "--adapter", "x"], "`--chains` must be different numbers from 0, got -1"),
        (["--inference-thoughts", "0"], "`--inference-thoughts` must be at least 1, got 0"),
        (["--limit", "0"], "`--limit` must be at least 1, got 0"),
        (["--controls", "--adapter", "x", "--batch-size", "1"], "`--batch-size` of at least 2, got 1"),
        (
            ["--adapter", "./no/such"],
            "`--adapter` must be a folder or a Hub id .*got './no/such', which is not an existing folder",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.parse_args(["--base", "x", *options])


@pytest.mark.parametrize("script", ["evaluate", "train_gsm8k", "estimate"])
def test_a_base_that_is_nowhere_is_named(script: str) -> None:
    module = evaluate if script == "evaluate" else load_example(script)
    others = [] if script == "evaluate" else ["--assistant", "owner/name"]
    with pytest.raises(
        ValueError, match=r"`--base` must be a folder or a Hub id .*got '/no/such', which is not an existing folder"
    ):
        module.parse_args(["--base", "/no/such", *others])
    module.parse_args(["--base", "owner/name", *others])


def test_the_tokenizer_of_an_adapter_is_found_in_the_cache_without_a_network(
    pair: Pair, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--somebody--thoughts"
    (repository / "refs").mkdir(parents=True)
    commit = "c0ffee".ljust(40, "0")
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    shutil.copytree(adapter, repository / "snapshots" / commit)
    absent = repository / ".no_exist" / commit / "config.json"  # which the Hub's library notes when it has asked
    absent.parent.mkdir(parents=True)
    absent.touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    load, chat = load_example("harness").load_tokenizer, [{"role": "user", "content": "Nine?"}]
    for name, thoughts in (("somebody/thoughts", N), (str(adapter), N), (None, 0), ("somebody/else", 0)):
        args = evaluate.parse_args(["--base", str(pair.base), *(["--adapter", name] if name else [])])
        assert load(args).apply_chat_template(chat, tokenize=False).count("<thought>") == thoughts


@pytest.mark.parametrize("shots", [0, 1])
def test_an_assistant_that_reads_the_question_alone_finds_it_in_every_task(
    shots: int, pair: Pair, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delimiters = ("<q a='b'>{{", '}}</q>\n"é"')
    model = pair.model(
        thought_token="<thought>", placement="thought_token", assistant_prompt_between=list(delimiters),
        assistant_model_name_or_path=str(pair.base),  # reads any text
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    with_thought_tokens(pair.tokenizer, model.peft_config["default"], before="\nHints:").save_pretrained(tmp_path)
    texts: list[str] = []
    reader_type = type(reader_of(model))
    encode = reader_type._encode
    monkeypatch.setattr(
        reader_type, "_encode", lambda self, found, num: texts.extend(found) or encode(self, found, num)
    )
    options = [
        "--adapter",
        str(tmp_path),
        "--num-fewshot",
        str(shots),
        "--limit",
        "2",
        "--tasks",
        "gsm8k,date_understanding",
    ]
    run(pair, data, tmp_path / "out", *options)
    rows = [row for task in ("gsm8k", "date_understanding") for row in logged(tmp_path / "out", task, "SoftCoT")]
    assert len(rows) == 4
    assert sorted(set(texts)) == sorted({row["doc"]["question"] for row in rows})
    for row in rows:
        prompt = row["arguments"]["gen_args_0"]["arg_0"]
        assert prompt.count(row["doc"]["question"].join(delimiters)) == 1
        assert [prompt.count(text) for text in delimiters] == [1, 1]


def test_one_question_has_no_other(pair: Pair, data: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 questions in 1 processes leave one alone"):
        run(pair, data, tmp_path, "--adapter", str(adapter), "--tasks", "aqua", "--controls", "--limit", "1")


@needs_data
def test_every_task_runs_on_its_real_data(pair: Pair, tmp_path: Path) -> None:
    results = run(pair, DATA, tmp_path, "--limit", "2")
    assert [len(score["right"]["first"]) for score in results["scores"]] == [2] * len(evaluate.TASKS)


@pytest.mark.parametrize(("until", "eos"), [([], range(1, 330, 12)), (["a", "th"], 1)], ids=["EOS", "stop texts"])
def test_batches_get_smaller_and_the_texts_stay_the_same(pair: Pair, until: list[str], eos: Any) -> None:
    prompts = [*QUESTIONS, "Nine?", "And ten?"]
    options = {"until": until, "max_gen_toks": 40, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, options), index) for index, prompt in enumerate(prompts)]
    model = pair.model()
    base = model.get_base_model()
    base.generation_config.eos_token_id = eos if isinstance(eos, int) else list(eos)
    texts, runs = {}, {}
    for kind in (HFLM, load_example("harness").Harness):
        rows = runs[kind] = []
        count = base.model.layers[0].register_forward_pre_hook(
            lambda module, args, rows=rows: rows.append(len(args[0]))
        )
        harness = kind(pretrained=model, tokenizer=pair.tokenizer, batch_size=len(prompts))
        texts[kind] = harness.generate_until(requests, disable_tqdm=True)
        count.remove()
    (all_texts, live_texts), (all_rows, live_rows) = texts.values(), runs.values()
    assert live_texts == all_texts
    assert len(set(all_texts)) == len(prompts)
    assert set(all_rows) == {len(prompts)}
    assert live_rows == sorted(live_rows, reverse=True)
    assert len(set(live_rows)) > 2
    assert len(live_rows) <= len(all_rows)
