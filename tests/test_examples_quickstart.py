"""The quickstart on a few problems and a few steps, and what comes with the repository for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import EXAMPLES, load_example
from transformers import AutoTokenizer

small_pair = load_example("small_pair")
quickstart = load_example("quickstart")


# Trainer's own, on a CPU without CUDA
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_quickstart_runs_and_everything_it_checks_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.main(["--steps", "3", "--held-out", "6", "--output-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("yes  ") == 6
    assert "NO " not in printed
    assert "| base alone | 0.0% | " in printed


def test_quickstart_stops_where_something_does_not_hold() -> None:
    with pytest.raises(SystemExit, match="should hold and does not: water runs uphill"):
        quickstart.check(False, "water runs uphill")


def test_problems_are_right_and_held_out_ones_never_trained_on() -> None:
    assert small_pair.in_words("12+34*5") == "twelve plus thirty four times five"
    assert small_pair.work_out("12+34*5") == "12+34=046;046*5=0230"
    train = {row["expression"] for row in small_pair.problems(3000, seed=0)}
    held_out = {row["expression"] for row in small_pair.problems(400, seed=1, held_out=True)}
    assert not train & held_out
    for expression in held_out:
        final = small_pair.work_out(expression).rpartition("=")[2]
        left = eval(expression[:5])  # two steps from left to right
        assert int(final) == eval(f"({left}){expression[5:]}") >= 0


def test_the_pairs_tokenizers_differ_and_reproduce_their_text() -> None:
    base, assistant = (AutoTokenizer.from_pretrained(EXAMPLES / "pair" / name) for name in ("base", "assistant"))
    assert base.get_vocab() != assistant.get_vocab()
    for row in small_pair.problems(50, seed=2):
        text = row["prompt"] + row["response"]
        assert base.decode(base.encode(text)) == text
        assert base.encode(text) == base.encode(row["prompt"]) + base.encode(row["response"])
        assert assistant.decode(assistant.encode(row["prompt"])) == row["prompt"]


def test_the_shipped_weights_are_small() -> None:
    assert sum(file.stat().st_size for file in (EXAMPLES / "pair").rglob("*.safetensors")) < 4e6
