"""The study of real models, run on the tiny pair: its plan, its splits, its prompts, and what a kill leaves."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from project_files import EXAMPLES
from tiny_pair import Pair, make_base
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
sys.path.append(str(EXAMPLES))
import real
from results.store import Store
from small_data import write_data
from study import data, plan, protocol, systems, tasks, training, work
from study.final import Final
from study.jobs import PAIRS, TRAINED, Evaluation, Training

PROTOCOL = "# Protocol\n\n<!-- choices:begin -->\nChosen by the pilot.\n<!-- choices:end -->\n"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_data(tmp_path_factory.mktemp("data"))

    def problems(numbers: range) -> str:
        rows = [
            {"question": f"Ann has {n} pears and buys {n + 1}. How many?", "answer": f"{n}+{n + 1}.\n#### {2 * n + 1}"}
            for n in numbers
        ]
        return "\n".join(map(json.dumps, rows)) + "\n"

    (folder / "gsm8k" / "train.jsonl").write_text(problems(range(60)), encoding="utf-8")
    (folder / "gsm8k" / "test_half.jsonl").write_text(problems(range(56, 66)), encoding="utf-8")
    shutil.copy(folder / "commonsenseqa" / "dev_half.jsonl", folder / "commonsenseqa" / "train.jsonl")
    rows = (folder / "commonsenseqa" / "dev_half.jsonl").read_text(encoding="utf-8").replace("hens", "ducks")
    (folder / "commonsenseqa" / "dev_half.jsonl").write_text(rows, encoding="utf-8")
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
    places = ["--models", str(models), "--data-dir", data_dir, "--output-dir", str(tmp_path / "runs")]
    return [*places, "--docs", str(tmp_path / "docs"), "--small", "--dtype", "float32"]


def half_right(task: str, row: dict[str, Any], text: str) -> str:
    """The tiny base solves nothing, so its answers are counted as right by chance."""
    return row["answer"] if int(data.digest(row["question"] + text)[:8], 16) % 4 else "wrong"


def test_the_whole_study_with_next_to_nothing_of_everything(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "extracted", half_right)
    monkeypatch.setattr("gc.collect", lambda: 0)  # takes longer than the rest of a job
    for part in ("rationales", "pilot", "tries", "protocol", "final"):
        real.main([*options, "--part", part])
