"""The quickstart on a few problems and a few steps, and what comes with the repository for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from project_files import EXAMPLES, load_example
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
    assert small_pair.put("12+34*5") == "Q: twelve plus thirty four times five?"
    assert small_pair.work_out("12+34*5") == "12+34=046;046*5=0230"
    trained, kept = set(), set()
    for kind in small_pair.KINDS:
        trained |= {row["expression"] for row in small_pair.problems(3000, seed=0, kind=kind)}
        kept |= {row["expression"] for row in small_pair.problems(400, seed=1, kind=kind, held_out=True)}
    assert not trained & kept
    for expression in kept:
        final = small_pair.work_out(expression).rpartition("=")[2]
        left = eval(expression[:5])  # two steps from left to right
        assert int(final) == eval(f"({left}){expression[5:]}") >= 0


@pytest.mark.parametrize("kind", ["names", "strangers"])
def test_every_name_stands_for_a_number_of_its_own(kind: str) -> None:
    number_of = dict(zip(small_pair.NAMES[kind], small_pair.NUMBERS[kind], strict=True))
    assert len(set(number_of.values())) == len(number_of)
    for row in small_pair.problems(100, seed=2, kind=kind):
        first, operator, second = row["prompt"].removeprefix("Q: ").split()[:3]
        expected = f"{number_of[first]}{'+' if operator == 'plus' else '-'}{number_of[second]}"
        assert row["expression"].startswith(expected)
    assert not set(small_pair.NAMES["names"]) & set(small_pair.NAMES["strangers"])


def test_the_assistant_knows_names_and_no_strangers() -> None:
    read = {
        kind: small_pair.share_solved(
            EXAMPLES / "pair" / "assistant", small_pair.problems(20, seed=3, kind=kind, held_out=True), "expression"
        )
        for kind in ("words", "names", "strangers")
    }
    assert read == {"words": 1.0, "names": 1.0, "strangers": 0.0}


def test_the_pairs_tokenizers_differ_and_reproduce_their_text() -> None:
    base, assistant = (AutoTokenizer.from_pretrained(EXAMPLES / "pair" / name) for name in ("base", "assistant"))
    assert base.get_vocab() != assistant.get_vocab()
    for row in [row for kind in small_pair.KINDS for row in small_pair.problems(20, seed=2, kind=kind)]:
        text = row["prompt"] + row["response"]
        assert base.decode(base.encode(text)) == text
        assert base.encode(text) == base.encode(row["prompt"]) + base.encode(row["response"])
        assert assistant.decode(assistant.encode(row["prompt"])) == row["prompt"]


def test_the_shipped_weights_are_small() -> None:
    assert sum(file.stat().st_size for file in (EXAMPLES / "pair").rglob("*.safetensors")) < 4e6
