"""The report: what is counted how, what a kill leaves, and the whole of it with next to nothing of everything."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from project_files import EXAMPLES

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
sys.path.append(str(EXAMPLES))
import report
import small_pair
from results import figures, jobs, sections, variants, work
from results.jobs import Making, Run, experiments, makings, tuning
from results.runner import run
from results.statistics import Share, share, votes
from results.store import Store, fingerprint
from results.work import SMALL, Sizes


class Serial:
    """A pool that works at once, in this process."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except RuntimeError as error:
            future.set_exception(error)
        return future


def test_a_share_is_the_mean_over_seeds_with_the_wider_interval() -> None:
    # Student: three seeds at 40, 50 and 60 % differ by 10 %, t(0.975, 2) = 4.3027, so 50 +- 4.3027 * 10 / sqrt(3)
    runs = [[1] * right + [0] * (100 - right) for right in (40, 50, 60)]
    found = share(runs)
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5 - 0.248417, 0.5 + 0.248417), abs=1e-5)
    # Wilson with n = 300 and none right: from 0 to z^2 / (n + z^2)
    none = share([[0] * 100] * 3)
    assert (none.mean, none.low, none.high) == pytest.approx((0, 0, 1.959964**2 / (300 + 1.959964**2)), abs=1e-6)
    assert str(Share(0.5, 0.25, 0.75)) == "50.0 [25.0, 75.0]"
    # the same 100 questions three times are 100 questions
    again = share([[0] * 100] * 3, same_questions=True)
    assert again.high == pytest.approx(1.959964**2 / (100 + 1.959964**2), abs=1e-6)


def test_a_share_stays_between_nothing_and_all() -> None:
    found = share([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    assert 0 <= found.low <= found.mean <= found.high <= 1


@pytest.mark.parametrize("runs", [[], [[]], [[1], []]])
def test_a_share_of_no_answers_is_refused(runs: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="`runs` must hold answers for each seed"):
        share(runs)


@pytest.mark.parametrize(
    ("finals", "samples", "right"),
    [
        (["7", "8", "8"], 1, 1),
        (["7", "8", "8"], 2, 1),  # equally frequent: the first
        (["7", "8", "8"], 3, 0),
        (["", "", "7"], 3, 1),  # nothing is no vote
        (["", "", ""], 3, 0),
        (["8", "7", "7"], 2, 0),
    ],
)
def test_the_most_frequent_of_the_first_results_counts(finals: list[str], samples: int, right: int) -> None:
    assert votes([finals], ["7"], samples) == [right]


def test_a_result_is_there_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, job = Store(tmp_path), Run("SoftCoT")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store[job] = {"right": [1]}
    assert job not in Store(tmp_path)
    store[job] = {"right": [1]}
    assert Store(tmp_path)[job] == {"right": [1]}
    assert Run("SoftCoT", asks=("digits", "controls")) not in store  # asked less, so not done
    assert Run("SoftCoT", learning_rate=0.01) not in store


def test_results_belong_to_one_state_of_the_code(tmp_path: Path) -> None:
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text("x")
    second.write_text("y")
    before = fingerprint([first, second])
    assert fingerprint([second, first]) == before
    second.write_text("z")
    assert fingerprint([first, second]) != before
    names = {path.relative_to(EXAMPLES.parent).as_posix() for path in report.sources(EXAMPLES / "pair")}
    assert {
        "softcot_peft/hooks.py",
        "examples/results/work.py",
        "examples/results/variants.py",
        "softcot_peft/analysis/controls.py",
        "examples/baselines/common.py",
        "examples/pair/base/model.safetensors",
    } <= names


def test_what_is_done_is_not_done_again_and_a_failure_names_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, asked, broken = Store(tmp_path), [], {2}
    todo = [Run("LoRA", seed=seed) for seed in range(4)]

    def perform(job: Run, *_: Any) -> dict[str, Any]:
        asked.append(job.seed)
        if job.seed in broken:
            raise RuntimeError("no memory")
        return {"right": [job.seed]}

    monkeypatch.setattr(report, "perform", perform)
    with pytest.raises(RuntimeError, match="The job 'LoRA_words_seed2_rate0_N8_width64' failed"):
        report.do(todo, store, Sizes(), tmp_path, Serial(), "jobs")
    assert asked == [0, 1, 2, 3]
    broken.clear()
    report.do(todo, store, Sizes(), tmp_path, Serial(), "jobs")
    assert asked == [0, 1, 2, 3, 2]
    assert [store[job]["right"] for job in todo] == [[0], [1], [2], [3]]


def test_jobs_that_run_when_another_fails_are_finished_and_stored(tmp_path: Path) -> None:
    store, begun, failed = Store(tmp_path), Event(), Event()
    broken, slow, late = (Run("LoRA", seed=seed) for seed in range(3))

    def work(job: Run) -> dict[str, Any]:
        if job == broken:
            begun.wait()
            failed.set()
            raise RuntimeError("no memory")
        begun.set()
        failed.wait()
        time.sleep(0.2)  # until the failure is noticed
        return {"right": [job.seed]}

    with ThreadPoolExecutor(2) as pool, pytest.raises(RuntimeError, match="The job 'LoRA_words_seed0"):
        run([broken, slow, late], store, "jobs", work, pool=pool, needs=lambda job: [slow] if job == late else [])
    assert slow in store
    assert late not in store


def test_a_new_field_does_not_rename_old_results(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Inner:
        name: str = "inner"
        added: int = 0

    @dataclass(frozen=True)
    class Job:
        name: str
        size: int = 1
        of: Any = None

    store = Store(tmp_path)
    plain = json.dumps({"name": "a"})
    assert store.path(Job("a")).name == f"a.{hashlib.sha256(plain.encode()).hexdigest()[:8]}.json"
    known = [Job("a"), Job("a", 2), Job("a", of=Inner()), Job("a", of=Inner(added=1)), Job("a", of=Inner("b"))]
    assert len({store.path(job) for job in known}) == len(known)


def test_the_rate_with_the_most_right_answers_is_taken_then_the_least_loss(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for job in tuning():
        place = jobs.RATES[job.system].index(job.learning_rate)
        right = [0, 0] if job.system == "prompt tuning" else [1, place == 1]
        store[job] = {"right": right, "loss": 1.0 - place / 10}
    rates = report.best_rates(store)
    assert rates["LoRA"] == jobs.RATES["LoRA"][1]
    assert rates["prompt tuning"] == jobs.RATES["prompt tuning"][-1]


def test_every_run_has_a_file_of_its_own_and_the_same_problems_as_its_rivals(tmp_path: Path) -> None:
    rates = dict.fromkeys(jobs.RATES, 0.01)
    runs = [*makings(), *tuning(), *experiments(rates, (0, 1, 2))]
    assert len({Store(tmp_path).path(job) for job in runs}) == len(runs)
    main = [run for run in experiments(rates, (0, 1, 2)) if run.hinted and run.width == 64 and not run.place]
    for kind in ("words", "names", "strangers"):
        asked = {(run.system, run.seed) for run in main if run.kind == kind and run.thoughts == 8}
        assert asked == {(system, seed) for system in (*jobs.UNTRAINED, *jobs.RATES) for seed in (0, 1, 2)}


def test_every_variant_has_its_runs_and_a_learning_rate_of_its_own_or_softcots() -> None:
    rates = dict.fromkeys(jobs.RATES, 0.01) | {"SoftCoT, mlp": 0.02}
    runs = [run for run in experiments(rates, (0, 1, 2)) if run.variant]
    assert {(run.variant, run.seed) for run in runs} == {
        (variant, seed) for variant in (*variants.PARTS, *variants.CHAINS) for seed in (0, 1, 2)
    }
    assert {run.learning_rate for run in runs if run.variant == "mlp"} == {0.02}
    assert {run.learning_rate for run in runs if run.variant != "mlp"} == {0.01}
    tried = [(run.variant, run.learning_rate) for run in tuning() if run.system == "SoftCoT"]
    assert set(tried) == {(name, rate) for name in ("", *variants.TUNED) for rate in jobs.RATES["SoftCoT"]}
    chains = [fields for fields in variants.VARIANTS.values() if "chain_init" in fields]
    assert {fields.get("num_chains", 1) for fields in chains} == {1, 2, 4, 8}
    assert all(work.VOTES_OF_CHAINS % fields.get("num_chains", 1) == 0 for fields in chains)


def test_the_fields_of_a_variant_reach_its_config(tmp_path: Path) -> None:
    for variant, fields in variants.VARIANTS.items():
        config = work.build(Run("SoftCoT", variant=variant), EXAMPLES / "pair", tmp_path).config
        assert {name: getattr(config, name) for name in fields} == fields
        assert (config.assistant_model_name_or_path is None) == (config.thought_source == "base")


def test_chains_answer_as_when_each_is_asked_alone() -> None:
    sizes, run = Sizes(sampled=3, seen=2), Run("SoftCoT", seed=3)
    config = {"num_chains": 4, "init_weights": False}
    system = work.SoftCoT(EXAMPLES / "pair" / "base", EXAMPLES / "pair" / "assistant", 8, config)
    asked = small_pair.problems(5, seed=0)
    found = work.chains(system, asked, [], sizes, run)
    prompts = [item["prompt"] for item in asked[:3]]
    by_chain = [[text.rpartition("=")[2] for text in system.answer(prompts, chains=chain)] for chain in range(4)]
    assert found["greedy"]["finals"] == [list(finals) for finals in zip(*by_chain, strict=True)]
    assert found["greedy"]["wanted"] == [item["response"][-4:] for item in asked[:3]]
    assert [len(finals) for finals in found["sampled"]["finals"]] == [work.VOTES_OF_CHAINS] * 3
    read = [work.collect_thoughts(system.model, system.tokenizer, prompts[:2], chain=chain) for chain in range(4)]
    pairs = [torch.cosine_similarity(read[i], read[j], dim=-1).mean() for i in range(4) for j in range(i)]
    assert found["similarity"] == pytest.approx(float(sum(pairs) / 6), abs=1e-5)


def test_what_lies_wholly_below_or_above_is_named() -> None:
    shares = {"SoftCoT": Share(0.5, 0.4, 0.6), "mlp": Share(0.2, 0.1, 0.3), "K": Share(0.5, 0.3, 0.55)}
    assert sections.worse(shares, "SoftCoT") == ["mlp (20.0 [10.0, 30.0])"]
    assert sections.better(shares, "SoftCoT") == []
    assert sections.better(shares, "mlp") == ["SoftCoT (50.0 [40.0, 60.0])"]


def test_figures_are_made_for_light_and_dark_pages_and_are_the_same_each_time(tmp_path: Path) -> None:
    one = Share(0.5, 0.4, 0.6)
    drawings = {
        "bars": figures.bars({"words": {"SoftCoT": one, "LoRA": one}, "names": {"SoftCoT": one, "LoRA": one}}),
        "lines": figures.lines({"SoftCoT": {1: one, 10: one}}, "samples", logarithmic=True),
        "scatter": figures.scatter({"SoftCoT": (one, one), "LoRA": (one, one)}, "new", "own"),
        "heat": figures.heat([[1.0, 2.0]], [1], [1, 2], "rows", "columns"),
        "maps": figures.maps({"words": [[1.0, 0.0], [0.0, 1.0]]}, "cosine", "question", "question"),
    }
    for name, draw in drawings.items():
        figures.save(draw, tmp_path / name, (3, 2))
        light, dark = ((tmp_path / f"{name}-{theme}.png").read_bytes() for theme in ("light", "dark"))
        assert light.startswith(b"\x89PNG")
        assert light != dark
        figures.save(draw, tmp_path / name, (3, 2))
        assert (tmp_path / f"{name}-light.png").read_bytes() == light


@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_the_whole_report_with_next_to_nothing_of_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = tmp_path / "docs"
    report.main(["--small", "--output-dir", str(tmp_path / "runs"), "--docs", str(docs), "--processes", "2"])
    page = (docs / "results.md").read_text(encoding="utf-8")
    assert "100.0 [" in page  # Assist-CoT solves words untrained
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for name in (*variants.PARTS, *variants.CHAINS):
        assert sum(line.startswith(f"| {name} | ") for line in rows) == 1 + (
            name in ("K = 4, trained", "K = 4, fixed")
        )
    assert all(any(line.startswith(f"| `{name}` | ") for line in rows) for name in ("default", "zero", "matched"))
    named = set(re.findall(r'(?:src|srcset)="([^"]+)"', page))
    assert named == {f"figures/{path.name}" for path in (docs / "figures").iterdir()}
    # again, from what is kept: the same page, and nothing is done
    monkeypatch.setattr(report, "perform", None)
    report.main(["--small", "--output-dir", str(tmp_path / "runs"), "--docs", str(docs)])
    assert (docs / "results.md").read_text(encoding="utf-8") == page
    assert SMALL.asked == 4
    (folder,) = (tmp_path / "runs").iterdir()
    assert Store(folder)[Making("base")]["alone"].keys() == {"digits", "words", "names", "strangers"}
