"""`examples/evaluate.py --engine vllm`: in float32, the answers and scores of transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from project_files import EXAMPLES, process_environment
from served import Served, skip_without_vllm
from small_data import write_data

skip_without_vllm()
pytest.importorskip("lm_eval")


def evaluate(served: Served, data: Path, adapter: str, out: Path, *options: str) -> dict[str, Any]:
    """The results, with what was answered to each question of a system under `answers`."""
    command = [sys.executable, str(EXAMPLES / "evaluate.py"), "--base", str(served.pair.base), "--no-bf16"]
    command += ["--adapter", str(served.adapters[adapter]), "--data-dir", str(data), "--output-dir", str(out)]
    command += ["--tasks", "gsm8k,strategyqa", "--max-new-tokens", "12", *options]
    variables = process_environment() | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    results["answers"] = {}
    for file in sorted(out.glob("scores/*/logs/**/samples_*.jsonl")):
        name = file.relative_to(out / "scores").parts[0].rsplit("_", 1)[0]
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        results["answers"][name] = {row["doc_id"]: row["resps"] for row in rows}
    return results


@pytest.mark.parametrize("adapter", ["first", "run"])
def test_scores_are_those_of_transformers(served: Served, adapter: str, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    one = evaluate(served, data, adapter, tmp_path / "transformers")
    other = evaluate(served, data, adapter, tmp_path / "vllm", "--engine", "vllm")
    assert one["scores"] == other["scores"]
    assert one["answers"] == other["answers"]
    assert len(one["answers"]) == 4  # two tasks, by the base and by SoftCoT
    for task in ("gsm8k", "strategyqa"):
        assert one["answers"][f"{task}_SoftCoT_41"] != one["answers"][f"{task}_base_41"]
