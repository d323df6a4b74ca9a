"""The study of real models, run on tiny ones: its plan, its splits, its prompts, and what a kill leaves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import source_of
from project_files import EXAMPLES, process_environment
from safetensors import safe_open
from tiny_pair import Pair, make_base
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
sys.path.append(str(EXAMPLES))
import real
from results.paired import difference, paired
from results.runner import run
from results.store import Store
from scipy.stats import ttest_1samp
from small_data import write_data
from study import data, made, plan, probing, protocol, systems, tasks, training, work
from study.adapters import public
from study.final import Final
from study.jobs import PAIRS, TRAINED, TRANSFERS, UNTRAINED, Evaluation, Training, asked
from study.stretches import stretched

from softcot_peft import SoftCoTConfig
from softcot_peft.analysis import collect_thoughts

PROTOCOL = "# Protocol\n\n<!-- choices:begin -->\nChosen by the pilot.\n<!-- choices:end -->\n"
TASKS = ("gsm8k", *TRANSFERS)
RATES = {system: rates[1] for system, rates in plan.FIRST_RATES.items()}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_data(tmp_path_factory.mktemp("data"))

    def put(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")

    def problems(numbers: range) -> list[dict[str, Any]]:
        return [
            {"question": f"Ann has {n} pears and buys {n + 1}. How many?", "answer": f"{n}+{n + 1}.\n#### {2 * n + 1}"}
            for n in numbers
        ]

    def choices(first: int, last: int) -> list[dict[str, Any]]:
        options = [{"label": label, "text": f"number {label}"} for label in "ABCDE"]
        return [
            {"answerKey": "ABCDE"[n % 5], "question": {"stem": f"Which is {n}?", "choices": options}}
            for n in range(first, last)
        ]

    put("gsm8k/train.jsonl", problems(range(60)))
    put("gsm8k/test_half.jsonl", problems(range(56, 66)))
    put("commonsenseqa/train.jsonl", choices(0, 60))
    put("commonsenseqa/dev_half.jsonl", choices(57, 72))
    options = [f"{letter}){n}" for n, letter in enumerate("ABCDE")]
    put("aqua/test_half.jsonl", [{"question": f"{n}?", "options": options, "correct": "BC"[n % 2]} for n in range(11)])
    strategy = [{"input": f"Is {n} even?", "target_scores": {"Yes": 1 - n % 2, "No": n % 2}} for n in range(11)]
    (folder / "strategyqa" / "task_half.json").write_text(json.dumps({"examples": strategy}), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def models(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    plain = make_base(len(pair.tokenizer)).config.to_dict()
    for heads in (4, 2, 6):
        sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": 2}
        LlamaForCausalLM(LlamaConfig(**plain | sizes)).save_pretrained(folder / f"heads{heads}")
        pair.tokenizer.save_pretrained(folder / f"heads{heads}")
    return folder


@pytest.fixture
def options(models: Path, data_dir: str, tmp_path: Path) -> list[str]:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / protocol.NAME).write_text(PROTOCOL, encoding="utf-8")
    (tmp_path / "README.md").write_text("<!-- real:begin -->\n<!-- real:end -->\n", encoding="utf-8")
    places = ["--models", str(models), "--data-dir", data_dir, "--output-dir", str(tmp_path / "runs")]
    return [*places, "--docs", str(tmp_path / "docs"), "--size", "trial", "--dtype", "float32"]


@pytest.fixture
def setting(models: Path, data_dir: str, tmp_path: Path) -> made.Setting:
    return made.Setting(real.find_models(models), tmp_path, data_dir, {}, "float32", max_new_tokens=8)


def half_right(task: str, row: dict[str, Any], text: str) -> str:
    """The tiny models solve nothing, so their answers are counted as right by chance."""
    return str(row["answer"]) if int(data.digest(row["question"] + text)[:8], 16) % 4 else "wrong"


def check_published(root: Path) -> None:
    """Check the table in the README, and the adapters of pairs A and B."""
    table = (root / "README.md").read_text(encoding="utf-8").partition("<!-- real:begin -->")[2]
    assert "| pair A | pair B |" in table
    assert re.search(r"\| SoftCoT, another question's as thoughts \| [\d.]+ \[", table)
    for heads in (4, 6):
        folder = root / "examples" / "adapters" / f"gsm8k-heads{heads}"
        assert sorted(path.name for path in folder.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert re.search(r"\| SoftCoT, zero vectors \| [\d.]+ \[", card)
        assert "Work this out one step at a time" in card
        assert re.search(r"\*\*: [+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\] points against the base alone", card)
        written = card + (folder / "adapter_config.json").read_text(encoding="utf-8")
        assert str(root) not in written
        assert f"local:heads{heads}" in written


def test_the_whole_study_with_next_to_nothing_of_everything(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks, "extracted", half_right)
    monkeypatch.setattr("gc.collect", lambda: 0)  # takes longer than the rest of a job
    for part in ("rationales", "pilot", "tries"):
        real.main([*options, "--part", part])
    with pytest.raises(ValueError, match="`--part final` uses the test files"):
        real.main([*options, "--part", "final"])
    for part in ("protocol", "final"):
        real.main([*options, "--part", part])
    with pytest.warns(UserWarning, match="must be a Hub id"):  # of the tiny models
        real.main([*options, "--part", "adapters"])
    check_published(tmp_path)
    page = (tmp_path / "docs" / "real-models.md").read_text(encoding="utf-8")
    for title in (
        "In short",
        "How much thoughts can carry",
        "Accuracy",
        "Paired tests",
        "Own and human rationales",
        "Other pairs",
        "Other tasks, and forgetting",
    ):
        assert f"\n## {title}\n" in page
    for title in ("Number of thoughts", "Self-consistency", "The thoughts themselves", "Every try"):
        assert f"\n## {title}\n" in page
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for name in (*UNTRAINED, *TRAINED, "SoftCoT, another question's", *plan.tries(1e-3, plan.SMALL)):
        assert any(line.startswith(f"| {name} | ") for line in rows), name
    named = set(re.findall(r'(?:src|srcset)="([^"]+)"', page))
    assert named == {f"figures/{path.name}" for path in (tmp_path / "docs" / "figures").iterdir()}
    (folder,) = (tmp_path / "runs").iterdir()
    final = Final(protocol.read(tmp_path / "docs"), plan.SMALL)
    assert all(Store(folder)[job]["same_when_disabled"] == [1, 1] for job in final.diagnoses())
    # again, from what is kept: the same page, and nothing is done
    monkeypatch.setattr(real, "perform", None)
    capsys.readouterr()
    real.main([*options, "--part", "final"])
    assert (tmp_path / "docs" / "real-models.md").read_text(encoding="utf-8") == page
    real.main([*options, "--plan"])
    assert "final: " in (printed := capsys.readouterr().out)
    assert "Left in all: 0.0 h" in printed


def test_what_is_done_before_a_kill_is_not_done_again(options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "real.py"), *options, "--part", "pilot"]
    environment = process_environment() | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and not list(tmp_path.glob("runs/*/*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = {path: path.read_bytes() for path in tmp_path.glob("runs/*/*.json")}
    assert kept
    real.main([*options, "--part", "pilot", "--processes", "2"])
    assert all(path.read_bytes() == text for path, text in kept.items())
    assert len(list(tmp_path.glob("runs/*/*.json"))) > len(kept)
    assert not list(tmp_path.glob("runs/*/*.half"))


def test_the_plan_is_printed_before_anything_runs_and_fits_its_hours(
    options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real.main([*options, "--size", "cpu", "--plan"])
    printed = capsys.readouterr().out
    for part in plan.PARTS:
        assert f"\n{part}: " in printed
    assert float(re.search(r"Left in all: ([\d.]+) h", printed)[1]) <= 12  # type: ignore[index]
    assert float(re.search(r"\npilot: \d+ jobs, ([\d.]+) h", printed)[1]) <= 0.5  # type: ignore[index]
    assert all(float(minutes) <= 20 for minutes in re.findall(r"([\d.]+) min", printed))
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_every_job_has_a_file_of_its_own_and_its_training_before_it(tmp_path: Path) -> None:
    sizes = plan.Sizes()
    jobs = Final(protocol.choices(RATES, {"rationales": "own"}, sizes), sizes).all()
    every = [*jobs, *dict.fromkeys(plan.all_tries(RATES, sizes)), *plan.pilots(Store(tmp_path), sizes)]
    assert len({Store(tmp_path).path(job) for job in every}) == len(set(every))
    done = set()
    for job in jobs:
        if isinstance(job, Evaluation) and job.training is not None:
            assert job.training in done
        done.add(job)
    # the same rows, steps and order for all systems of a pair
    shared = {(job.steps, job.batch, job.rationales) for job in jobs if isinstance(job, Training) and job.pair == "A"}
    assert {each[:2] for each in shared} == {(sizes.steps, sizes.batch)}
    assert {job.split for job in jobs if isinstance(job, Evaluation)} == {"test"}
    searched = [job for job in every if isinstance(job, Evaluation) and job not in jobs]
    assert {job.split for job in searched} == {"validation"}


def test_the_search_goes_on_until_worse_rates_lie_on_both_sides(tmp_path: Path) -> None:
    store, sizes = Store(tmp_path), plan.Sizes()
    best = {"prompt tuning": 3e-2, "placeholders": 3e-3, "LoRA": 3e-5, "SoftCoT": 1e-2}
    while not all(job in store for job in plan.pilots(store, sizes)):
        for job in plan.pilots(store, sizes):
            distance = abs(torch.tensor(job.learning_rate / best[job.system]).log().item())
            store[job] = {"losses": {"own": distance}, "before": 1.0}
    assert plan.rates_of(store, sizes) == pytest.approx(best)
    for system, rate in best.items():
        tried = plan.searched(system, store, sizes)[0]
        assert min(tried) < rate < max(tried)
    assert [plan.step_of(1e-3, 1), plan.step_of(1e-3, -1), plan.step_of(3e-1, 1)] == pytest.approx([3e-3, 3e-4, 1.0])


def test_the_parts_of_a_task_never_overlap(data_dir: str) -> None:
    for task in data.HAVE_TRAINING:
        parts = {part: data.split(task, part, data_dir) for part in ("training", "validation", "test")}
        found = {part: {data.digest(row["question"]) for row in rows} for part, rows in parts.items()}
        assert all(found[part] and len(found[part]) == len(rows) for part, rows in parts.items())
        assert not found["training"] & found["validation"]
        assert not (found["training"] | found["validation"]) & found["test"]
    assert len(data.split("gsm8k", "test", data_dir)) == 6  # ten, without those of the training file
    assert data.digest("How many?  Two ") == data.digest("how many two")
    with pytest.raises(ValueError, match="must be one with a training file"):
        data.split("aqua", "validation", data_dir)


@pytest.mark.parametrize("task", TASKS)
def test_the_delimiters_stand_around_what_is_asked_and_options(task: str, data_dir: str) -> None:
    row = data.split(task, "test", data_dir)[0] | {"question": "What </question> is <Question>\n this?"}
    text = tasks.question_text(task, row)
    assert [text.count(mark) for mark in systems.DELIMITERS] == [1, 1]
    inside = tasks.between(text)
    assert inside.startswith("What < /question> is < Question>\n this?")
    assert all(option in inside for option in row["options"])
    assert "Answer" not in inside
    assert "'Answer: " in text
    assert tasks.extracted(task, row, f"So.\nAnswer: {row['answer']}") == row["answer"]
    assert tasks.extracted(task, row, "") != row["answer"]


def test_all_systems_read_the_same_prompt(setting: made.Setting, data_dir: str) -> None:
    row = data.split("gsm8k", "validation", data_dir)[0]
    untrained = {name: made.system_of(Evaluation("A", name), setting) for name in UNTRAINED}
    trained = {name: made.build(Training(system=name, thoughts=3), setting) for name in TRAINED}
    (example,) = made.examples("gsm8k", [row], untrained["zero-shot"])
    plain = untrained["zero-shot"].prompt_ids([example["prompt"]])[0]
    for name in ("prompt tuning", "LoRA", "SoftCoT"):
        assert trained[name].prompt_ids([example["prompt"]])[0] == plain
    for system, number in ((trained["placeholders"], 3), (untrained["CoT-Unk"], 8)):
        ids = system.prompt_ids([example["prompt"]])[0]
        assert ids[:-number] == plain
        assert not set(ids[-number:]) & set(plain)
    hinted = untrained["Assist-CoT"]
    hint = systems.HINT.format(hint=hinted.hints([example["prompt"]])[0].strip())
    end = "<|end|><|assistant|>"
    assert hinted.tokenizer.decode(hinted.prompt_ids([example["prompt"]])[0]) == (
        example["prompt"].removesuffix(end) + hint + end
    )
    assert {name: each.rows([example])[0][1] for name, each in trained.items()} == dict.fromkeys(
        trained, untrained["zero-shot"].rows([example])[0][1]
    )


@pytest.mark.parametrize("system", TRAINED)
def test_a_trained_system_answers_the_same_when_loaded_and_whatever_the_batch(
    system: str, setting: made.Setting, data_dir: str
) -> None:
    job = Training(system=system, thoughts=2, learning_rate=0.3, steps=2, batch=3)
    trained = made.build(job, setting)
    rows = made.examples("gsm8k", data.split("gsm8k", "training", data_dir)[:6], trained)
    before = {name: value.clone() for name, value in trained.model.named_parameters()}
    lengths = [len(row["question"]) for row in rows]
    training.learn(trained, trained.rows(rows), training.order(lengths, job.steps, job.batch, 0), job)
    for name, value in trained.model.named_parameters():
        assert value.requires_grad != torch.equal(value, before[name]), name  # all that is trained moves, nothing else
    made.keep(trained, made.weights_file(job, setting))
    prompts = [row["prompt"] for row in rows]
    texts = trained.answer(prompts)
    loaded = made.load(job, setting)
    assert loaded.answer(prompts) == texts
    assert [loaded.answer([prompt])[0] for prompt in prompts] == texts
    assert len(loaded.answer(prompts, num_return_sequences=2, do_sample=True)) == 12


@pytest.mark.parametrize("system", TRAINED)
def test_the_loss_is_that_of_all_logits(system: str, setting: made.Setting, data_dir: str) -> None:
    built = made.build(Training(system=system, thoughts=2), setting)
    rows = built.rows(made.examples("gsm8k", data.split("gsm8k", "training", data_dir)[:5], built))
    rows = [(prompt[place:], response[: 3 + place]) for place, (prompt, response) in enumerate(rows)]
    if system == "SoftCoT":  # its prompts must be whole
        rows = built.rows(made.examples("gsm8k", data.split("gsm8k", "training", data_dir)[:5], built))
    with torch.no_grad():
        summed = sum(float(built.model(**built.collate([row]))["loss"]) * len(row[1]) for row in rows)
    assert training.loss(built, rows) == pytest.approx(summed / sum(len(response) for _, response in rows), abs=1e-4)


def test_rows_of_like_length_are_together_and_every_row_comes_once_per_epoch() -> None:
    lengths = [place * 7 % 31 for place in range(24)]
    steps = training.order(lengths, steps=12, batch=4, seed=3)
    assert [len(step) for step in steps] == [4] * 12
    assert sorted(place for step in steps[:6] for place in step) == list(range(24)) or len(steps) == 12
    assert sorted(place for step in steps for place in step) == sorted([*range(24)] * 2)
    spread = [max(lengths[i] for i in step) - min(lengths[i] for i in step) for step in steps]
    assert sum(spread) / len(spread) < 15  # in random batches about 20
    assert training.order(lengths, 12, 4, seed=3) == steps != training.order(lengths, 12, 4, seed=4)
    assert [len(part) for part in systems.batches(range(17), 16)] == [8, 9]


def test_precomputed_thoughts_and_the_contrastive_term_train(setting: made.Setting, data_dir: str) -> None:
    losses = {}
    for contrast, ahead in ((0.0, False), (0.0, True), (5.0, True)):
        job = Training(thoughts=2, learning_rate=0.1, steps=2, batch=4, contrast=contrast)
        system = made.build(job, setting)
        rows = system.rows(made.examples("gsm8k", data.split("gsm8k", "training", data_dir)[:8], system))
        if ahead:
            training.precompute(system, rows)
        losses[contrast, ahead] = training.learn(system, rows, [[0, 1, 2, 3], [4, 5, 6, 7]], job)
    assert losses[0.0, True] == pytest.approx(losses[0.0, False], abs=1e-5)
    assert losses[5.0, True][0] == pytest.approx(losses[0.0, True][0], abs=1e-5)
    assert losses[5.0, True][1] != pytest.approx(losses[0.0, True][1], abs=1e-5)


def test_a_shallow_assistant_has_fewer_layers(setting: made.Setting) -> None:
    system = made.build(Training(depth=0.5), setting)
    assert system.config.assistant_model_name_or_path.endswith("to layer 1")


def test_mcnemar_by_hand() -> None:
    first, second = [1] * 9 + [0] * 2 + [1, 0] * 20, [0] * 9 + [1] * 2 + [1, 0] * 20
    found = paired(first, second)
    assert (found.gained, found.lost, found.asked) == (9, 2, 51)
    by_hand = 2 * sum(comb(11, k) for k in range(3)) / 2**11
    assert found.p == pytest.approx(by_hand)
    assert found.difference == pytest.approx(100 * 7 / 51)
    assert paired([1, 0], [1, 0]).p == 1
    with pytest.raises(ValueError, match="the same questions, got 1 and 2"):
        paired([1], [1, 0])


def test_a_probe_finds_what_is_there_and_nothing_else() -> None:
    torch.manual_seed(0)
    answers = ["AB"[place % 3 % 2] for place in range(200)]
    noise = torch.randn(200, 30)
    nothing = probing.probe(noise, answers)
    noise[:, 3] += torch.tensor([3.0 if answer == "A" else -3.0 for answer in answers])
    assert sum(probing.probe(noise, answers)["right"]) > 180
    assert abs(sum(nothing["right"]) - sum(nothing["most_frequent"])) < 40
    assert nothing["classes"] == 2
    with pytest.raises(ValueError, match="at least 10"):
        probing.probe(noise[:5], answers[:5])


def test_the_best_try_is_the_one_with_the_largest_gap_among_the_best(tmp_path: Path) -> None:
    store, sizes = Store(tmp_path), plan.Sizes(tried=100)
    every = plan.tries(1e-3, sizes)
    gaps = {"no lead-in": (60, 0.3), "N = 32": (63, 0.1), "contrastive term": (20, 0.9), "base as source": (99, 0.9)}
    with pytest.raises(ValueError, match="'plain' is not"):
        protocol.best_try(store, {"SoftCoT": 1e-3}, sizes)
    for name, job in every.items():
        right, gap = gaps.get(name, (50, 0.05))
        store[job] = {"losses": {"own": 1.0, "other_question": 1.0 + gap, "mean": 1.0}}
        for each in plan.tried(job, sizes).values():
            store[each] = {"right": [1] * right + [0] * (100 - right), "tokens": 9.0}
    assert protocol.best_try(store, {"SoftCoT": 1e-3}, sizes) == ("no lead-in", every["no lead-in"])
    chosen = protocol.choices(RATES, protocol.fields(every["no lead-in"]), sizes)
    assert chosen["SoftCoT"]["lead_in"] is False
    assert "lead_in" not in chosen["LoRA"]
    assert {each["rationales"] for each in chosen.values()} == {"own"}
    assert chosen["LoRA"]["learning_rate"] == RATES["LoRA"]


def test_models_are_told_apart_by_size_and_others_refused(models: Path, tmp_path: Path) -> None:
    found = {size: Path(name).name for size, name in real.find_models(models).items()}
    assert found == {"small": "heads2", "medium": "heads4", "large": "heads6"}
    shutil.copytree(models / "heads2", tmp_path / "heads2")
    with pytest.raises(ValueError, match="two or three models, each in a subfolder, got 1"):
        real.find_models(tmp_path)
    assert real.find_models(None) == real.HUB
    assert {size for pair in PAIRS.values() for size in pair} == set(real.HUB)


def test_a_base_that_wrote_too_few_right_answers_is_named(setting: made.Setting) -> None:
    (job,) = plan.writings(plan.Sizes(written=(("medium", 4),)), ["medium"])["medium"]
    Store(setting.folder)[job] = {"kept": []}
    known = made.Setting(**vars(setting) | {"writings": {"medium": (job,)}})
    with pytest.raises(ValueError, match="medium model, which wrote 0 right answers"):
        made.training_rows(Training(rationales="own"), known)


def test_the_mark_of_thoughts_is_a_token_that_no_prompt_has(models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "heads4")
    token = systems.unused_token(tokenizer)
    assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1
    assert token not in tasks.rendered(tokenizer, "What?")
    assert asked(Training(), control="zero").name == "ask_A_SoftCoT_gsm8k_test_zero"


def test_the_spread_of_states_by_hand() -> None:
    same = torch.tensor([3.0, 4.0]).expand(5, 2, 2)
    assert probing.spread(same) == pytest.approx({"norm": 5.0, "cosine": 1.0, "share": 0.0}, abs=1e-6)
    states = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]])  # two questions, one position
    assert probing.spread(states) == pytest.approx({"norm": 2**0.5, "cosine": 0.0, "share": 0.5}, abs=1e-6)


def test_a_job_in_a_pool_waits_for_what_it_needs(tmp_path: Path) -> None:
    training = Training(system="LoRA")
    jobs: list[Any] = [asked(training), training, Evaluation("A", "zero-shot")]
    store = Store(tmp_path)

    def work(job: Any) -> dict[str, Any]:
        return {"known": training in store}

    with ThreadPoolExecutor(3) as pool:
        run(jobs, store, "jobs", work, pool=pool, needs=lambda job: plan.needs(job, {}))
    assert store[asked(training)]["known"]
    assert all(job in store for job in jobs)
    own = Training(rationales="own")
    written = plan.writings(plan.SMALL, ["medium"])
    assert plan.needs(own, written) == written["medium"]
    assert plan.needs(Training(), written) == ()


def test_standardized_states_differ_between_questions_and_load_the_same(setting: made.Setting, data_dir: str) -> None:
    job = Training(thoughts=2, standardized=True, projection_init="matched")
    system = made.build(job, setting)
    rows = made.examples("gsm8k", data.split("gsm8k", "training", data_dir)[:8], system)
    prompts = [row["prompt"] for row in rows]
    options = {"padding_side": "left", "add_special_tokens": False}
    plain = made.build(Training(thoughts=2, projection_init="matched"), setting)
    found = [collect_thoughts(each.model, each.tokenizer, prompts, **options) for each in (plain, system)]
    shares = [probing.spread(thoughts)["share"] for thoughts in found]
    assert shares[1] > 0.3 > shares[0]
    made.keep(system, made.weights_file(job, setting))
    loaded = made.load(job, setting)
    again = collect_thoughts(loaded.model, loaded.tokenizer, prompts, **options)
    torch.testing.assert_close(again, found[1])
    system.model.peft_config["default"].inference_num_thought_tokens = 5  # more than in training
    assert collect_thoughts(system.model, system.tokenizer, prompts, **options).shape[1] == 5


def test_only_the_assistant_reads_the_question_of_a_blind_base(setting: made.Setting, data_dir: str) -> None:
    job = Training(thoughts=2, blind=True)
    system = made.build(job, setting)
    rows = made.examples("gsm8k", data.split("gsm8k", "training", data_dir)[:6], system)
    blind, sighted = system.rows(made.blinded(rows, system)), system.rows(rows)
    for row, (prompt, response), (_, same) in zip(rows, blind, sighted, strict=True):
        assert row["question"] not in system.tokenizer.decode(prompt)
        assert response == same
    read = probing.states(system, sighted)
    training.precompute(system, blind, sighted)
    source = source_of(system.model)
    for prompt, states in zip((prompt for prompt, _ in blind), read, strict=True):
        ids = torch.tensor([prompt])
        torch.testing.assert_close(source.precomputed.find(ids, torch.ones_like(ids), 2).flatten(), states)
    result = work.train(job, setting)
    assert result["losses"]["own"] != result["losses"]["other_question"]


def test_a_trained_embedding_moves_and_is_loaded_again(setting: made.Setting, data_dir: str) -> None:
    job = Training(thoughts=2, chain_init="trained", steps=2, batch=2, validated=2, learning_rate=0.1)
    begun = source_of(made.build(job, setting).model).chains.weight.detach().clone()
    work.train(job, setting)
    trained = source_of(made.load(job, setting).model).chains.weight
    assert not torch.equal(trained, begun)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 9])
def test_stretches_of_a_question_are_means_of_its_tokens(number: int) -> None:
    lengths, wide = (7, 3, 5), 8
    states = torch.randn(3, wide, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * (wide - length) + [1] * length for length in lengths])
    found = stretched(states, mask, number)
    assert found.shape == (3, number, 4)
    for row, length in enumerate(lengths):
        tokens = states[row, wide - length :]
        for place in range(number):
            first = place * length // number
            last = max((place + 1) * length // number, first + 1)
            torch.testing.assert_close(found[row, place], tokens[first:last].mean(0))


def test_states_of_the_question_do_not_depend_on_other_rows(setting: made.Setting, data_dir: str) -> None:
    system = made.build(Training(thoughts=3, thought_source="question_stretches"), setting)
    rows = made.examples("gsm8k", data.split("gsm8k", "training", data_dir)[:5], system)
    prompts = [row["prompt"] + " " * (3 * place) for place, row in enumerate(rows)]
    options = {"padding_side": "left", "add_special_tokens": False}
    together = collect_thoughts(system.model, system.tokenizer, prompts, **options)
    alone = [collect_thoughts(system.model, system.tokenizer, [prompt], **options) for prompt in prompts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_difference_has_the_interval_of_a_paired_test() -> None:
    first, second = [[1, 1, 0, 1, 0], [1, 0, 0, 1, 1]], [[0, 1, 0, 0, 0]]
    found = difference(first, second)
    means = [100 * ((a + b) / 2 - c) for a, b, c in zip(*first, *second, strict=True)]
    wanted = ttest_1samp(means, 0).confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((sum(means) / 5, wanted.low, wanted.high))
    assert not found.beyond_chance
    assert difference([[1] * 9 + [0]], [[0] * 10]).beyond_chance
    with pytest.raises(ValueError, match="answers to the same questions"):
        difference([[1, 0]], [[1]])


def test_models_have_their_public_names_only_if_their_folders_do() -> None:
    hub = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert public("models/qwen2.5-coder-0.5b", hub) == hub
    assert public(hub, hub) == hub
    assert public("models/mine", hub) == "models/mine"


ADAPTERS = sorted((EXAMPLES / "adapters").iterdir())


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: folder.name)
def test_an_adapter_in_the_repository_is_whole_and_names_public_models(folder: Path) -> None:
    config = SoftCoTConfig.from_pretrained(folder)
    names = config.base_model_name_or_path, config.assistant_model_name_or_path
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in names)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"https://huggingface.co/{name}" in card for name in names)
    assert all(f"| SoftCoT, {label} | " in card for label in ("another question's", "average", "zero vectors"))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = {name.rpartition(".")[2]: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    hidden = config.base_hidden_size, config.assistant_hidden_size
    assert shapes == {"weight": list(hidden), "bias": [hidden[0]]}


def test_the_adapters_in_the_repository_are_small() -> None:
    assert len(ADAPTERS) == 2
    assert sum(path.stat().st_size for folder in ADAPTERS for path in folder.iterdir()) < 16e6
