"""The tasks' data: the same rows from the publishers' files and from the Hub's shapes; problems with other numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_data import AQUA, ASDIV, COMMONSENSEQA, DATES, GSM8K, STRATEGYQA, write_data

pytest.importorskip("datasets")
from evaluation import augment, data

LOADERS: dict[str, Callable[..., Any]] = {
    "gsm8k": data.gsm8k,
    "asdiv": data.asdiv,
    "asdiv_aug": data.asdiv_augmented,
    "aqua": data.aqua,
    "strategyqa": data.strategyqa,
    "date_understanding": data.date_understanding,
    "commonsenseqa": data.commonsenseqa,
}
ANSWERS = {
    "gsm8k": ["12", "2400", "15"],
    "asdiv": ["13", "14"],  # a time of day is no number
    "aqua": ["C", "B", "E"],
    "strategyqa": ["yes", "no", "yes"],
    "date_understanding": ["05/04/2020", "02/01/2019", "06/08/2018"],
    "commonsenseqa": ["B", "A", "D"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@pytest.mark.parametrize("name", ANSWERS)
def test_files_give_questions_and_canonical_answers(folder: Path, name: str) -> None:
    found = LOADERS[name](data_dir=str(folder), config_source="ignored")["test"]
    assert list(found["answer"]) == ANSWERS[name]
    assert set(found.features) == {"question", "options", "answer", "solution"}


def test_options_lose_their_letters_and_solutions_their_marks(folder: Path) -> None:
    assert LOADERS["aqua"](data_dir=str(folder))["test"][0]["options"] == ["7", "8", "9", "10", "11"]
    first = LOADERS["gsm8k"](data_dir=str(folder))["train"][0]
    assert first["solution"] == "She has 3 + 9 = 12.\nAnswer: 12"
    assert LOADERS["commonsenseqa"](data_dir=str(folder))["test"][1]["options"][0] == "chair"


def hub(*request: str, split: str | None = None) -> Any:
    """What the Hub's data sets look like."""
    big_bench = {"strategyqa_zero_shot": STRATEGYQA, "date_understanding_zero_shot": DATES}
    if request == ("openai/gsm8k", "main"):
        return {"train": GSM8K, "test": GSM8K}
    if request == ("EleutherAI/asdiv", "asdiv") and split == "validation":
        return [dict(zip(("body", "question", "answer", "formula"), row, strict=True)) for row in ASDIV]
    if request == ("deepmind/aqua_rat", "raw") and split == "test":
        return AQUA
    if request[0] == "hails/bigbench" and split == "default":
        return [
            {
                "inputs": f"Q: {row['input']}\nA:",
                "multiple_choice_targets": list(row["target_scores"]),
                "multiple_choice_scores": list(row["target_scores"].values()),
            }
            for row in big_bench[request[1]]
        ]
    if request == ("tau/commonsense_qa",) and split == "validation":
        return [
            {
                "question": row["stem"],
                "choices": {"label": [*"ABCDE"], "text": row["texts"]},
                "answerKey": row["answerKey"],
            }
            for row in COMMONSENSEQA
        ]
    raise AssertionError(f"the Hub was asked for {request}, {split}")


@pytest.mark.parametrize("name", LOADERS)
def test_the_hub_gives_the_same_rows(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load_dataset", hub)
    assert LOADERS[name]()["test"].to_list() == LOADERS[name](data_dir=str(folder))["test"].to_list()


@pytest.mark.parametrize("name", LOADERS)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"`data_dir` must hold .*\.(jsonl?|xml).*leave `data_dir` out"):
        LOADERS[name](data_dir=str(tmp_path))


def test_a_missing_field_and_an_empty_file_are_named(folder: Path) -> None:
    file = folder / "aqua" / "test_half.jsonl"
    file.write_text('{"question": "x", "correct": "A"}\n')
    with pytest.raises(
        ValueError, match=r"test_half.jsonl must have the field 'options', row 0 has \['correct', 'quest"
    ):
        data.aqua(data_dir=str(folder))
    file.write_text("")
    with pytest.raises(ValueError, match="must hold rows that can be scored, found none"):
        data.aqua(data_dir=str(folder))


# Other numbers


@pytest.mark.parametrize(
    ("text", "formula", "old", "solve"),
    [
        ("Nine birds sat on a wire and 4 came. How many?", "9+4=13", [9, 4], lambda a, b: a + b),
        ("There were twenty-one hens and 1,200 eggs.", "1200-21=1179", [21, 1200], lambda a, b: b - a),
        ("He had 40 nuts, ate 4 and shared the rest by 6.", "(40-4)/6=6", [40, 4, 6], lambda a, b, c: (a - b) / c),
    ],
)
def test_other_numbers_have_the_answer_of_their_formula(
    text: str, formula: str, old: list[int], solve: Callable[..., float]
) -> None:
    found = list(augment.variants(text, formula, seed=3))
    assert found == list(augment.variants(text, formula, seed=3))
    assert found != list(augment.variants(text, formula, seed=4))
    assert len({question for question, _ in found}) == len(found) == augment.VARIANTS
    for question, answer in found:
        new = [int(digits) for digits in re.findall(r"\d+", question)]
        assert all(max(2, before // 2) <= after <= 2 * before for before, after in zip(old, new, strict=True))
        assert new != old
        assert solve(*new) == int(answer) > 0


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("He has 5 pens in each of 5 boxes.", "5*5=25"),  # which five is which?
        ("He has 5 pens, and 3 are red. He buys 2.", "5+2=7"),  # a number that is not in the formula
        ("He has 5 pens and buys 2.", "5+2=8"),  # a formula that is wrong
        ("He has five hundred pens and buys 2.", "500+2=502"),
        ("He has 5.5 pens and buys 2.", "5.5+2=7.5"),
        ("Of 50% of 8 pens.", "50*8=400"),
        ("He comes at 9:10 and stays 4 hours.", "9+4=13"),
        ("One of 4 pens is his.", "4-1=3"),  # "one" may be no number
        ("Share 9 nuts among 2.", "9/2=4 r1"),
        ("The least common multiple of 4 and 6.", "LCM(4,6)=12"),
        ("He has 5 pens.", "__import__('os')"),
        ("He has 5 pens.", ""),
    ],
)
def test_problems_that_do_not_say_what_depends_on_what_are_left_out(text: str, formula: str) -> None:
    assert list(augment.variants(text, formula, seed=0)) == []


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7+2", 9),
        ("(8-2)/3", 2),
        ("2-8", None),
        ("8/3", None),
        ("3-3", None),
        ("8/0", None),
        ("2**3", None),
        ("f(1)", None),
    ],
)
def test_only_whole_numbers_from_one_on_are_steps(expression: str, value: int | None) -> None:
    assert augment.evaluate(expression) == value
