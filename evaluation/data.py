"""The data of the tasks, from the Hub or from local files, in a common format.

A row has `question`, `options` (texts without letters, or empty), `answer` (canonical; see `answers.py`) and
`solution` (the response in few-shot examples). A local folder has one subfolder per data set, with the publisher's
original files; a name may contain `_half` if the file has only a part. lm-evaluation-harness calls these functions
with a task's metadata.
"""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

# lm-evaluation-harness loads this file by its path, so `evaluation` cannot be imported otherwise.
sys.path.append(str(Path(__file__).parents[1]))
from evaluation.answers import asdiv_gold, date, number
from evaluation.augment import variants

Row = dict[str, Any]
Read = Callable[[dict[str, Any]], "Row | None"]


def local_file(data_dir: str, folder: str, *names: str) -> Path:
    """Return the first of some files that exists in a folder.

    Raises:
        FileNotFoundError: If none exists.
    """
    paths = [Path(data_dir) / folder / name for name in names]
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"`data_dir` must hold {' or '.join(f'{folder}/{name}' for name in names)}, found none in {data_dir!r}. Put "
        "the file there, or leave `data_dir` out to load from the Hub."
    )


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Load the rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]


def rows(raw: Iterable[dict[str, Any]], read: Read, source: object) -> Dataset:
    """Convert rows to the common format; omit rows for which `read` returns None.

    Raises:
        ValueError: If a row lacks a field, or no row is left.
    """
    kept: list[Row] = []
    for place, item in enumerate(raw):
        try:
            row = read(item)
        except KeyError as error:
            raise ValueError(
                f"Each row of {source} must have the field {error}, row {place} has {sorted(item)}."
            ) from error
        if row is not None:
            kept.append({"options": [], **row, "solution": row.get("solution") or f"Answer: {row['answer']}"})
    if not kept:
        raise ValueError(f"{source} must hold rows that can be scored, found none.")
    return Dataset.from_list(kept)


def choices(question: str, options: Sequence[str], answer: str) -> Row:
    """Create a row with options; the answer is a letter."""
    return {"question": question, "options": list(options), "answer": answer}


# GSM8K


def read_gsm8k(item: dict[str, Any]) -> Row:
    """Read `question`, and `answer` with calculator annotations and `#### 72` at the end."""
    worked, _, answer = re.sub(r"<<.*?>>", "", item["answer"]).rpartition("####")
    canonical = number(answer)
    return {
        "question": item["question"],
        "answer": canonical,
        "solution": f"{worked.strip()}\nAnswer: {canonical}",
    }


def gsm8k(data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Load the splits `train` and `test`; Cobbe et al. 2021, arXiv 2110.14168."""
    if data_dir is None:
        raw: Any = load_dataset("openai/gsm8k", "main")
        return DatasetDict({split: rows(raw[split], read_gsm8k, "openai/gsm8k") for split in ("train", "test")})
    files = {"train": ("train.jsonl",), "test": ("test.jsonl", "test_half.jsonl")}
    paths = {split: local_file(data_dir, "gsm8k", *names) for split, names in files.items()}
    return DatasetDict({split: rows(json_lines(path), read_gsm8k, path) for split, path in paths.items()})


# ASDiv


def asdiv_raw(data_dir: str | None) -> tuple[list[dict[str, Any]], object]:
    """Load rows with `body`, `question`, `answer` and `formula`, and return their source."""
    if data_dir is None:
        return list(load_dataset("EleutherAI/asdiv", "asdiv", split="validation")), "EleutherAI/asdiv"
    path = local_file(data_dir, "asdiv", "ASDiv.xml")
    problems = ET.parse(path).getroot().iter("Problem")  # noqa: S314  # the caller's own file
    return [{child.tag.lower(): (child.text or "").strip() for child in problem} for problem in problems], path


def read_asdiv(item: dict[str, Any]) -> Row | None:
    """Read a problem whose answer is one number; omit the others, see `asdiv_gold`."""
    answer = asdiv_gold(item["answer"])
    return None if answer is None else {"question": f"{item['body']} {item['question']}", "answer": answer}


def asdiv(data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Load the split `test`; Miao et al. 2020, arXiv 2106.15772."""
    raw, source = asdiv_raw(data_dir)
    return DatasetDict({"test": rows(raw, read_asdiv, source)})


def asdiv_augmented(data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Load the split `test`: variants of each suitable problem with other numbers; SoftCoT paper, section 4.1."""
    raw, source = asdiv_raw(data_dir)
    problems = [
        {**item, "text": f"{item['body']} {item['question']}", "place": place} for place, item in enumerate(raw)
    ]
    made = [
        {"question": text, "answer": answer}
        for item in problems
        for text, answer in variants(item["text"], item["formula"], seed=item["place"])
    ]
    return DatasetDict({"test": rows(made, lambda item: item, source)})


# AQuA


def read_aqua(item: dict[str, Any]) -> Row:
    """Read `question`, `options` with letters ("A)36"), and the letter `correct`."""
    texts = [re.sub(r"^\(?[A-E]\)\s*", "", option) for option in item["options"]]
    return choices(item["question"], texts, item["correct"])


def aqua(data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Load the split `test`; Ling et al. 2017, arXiv 1705.04146."""
    if data_dir is None:
        return DatasetDict(
            {"test": rows(load_dataset("deepmind/aqua_rat", "raw", split="test"), read_aqua, "deepmind/aqua_rat")}
        )
    path = local_file(data_dir, "aqua", "test.jsonl", "test.json", "test_half.jsonl")
    return DatasetDict({"test": rows(json_lines(path), read_aqua, path)})


# BIG-bench


def big_bench(name: str, canonical: Callable[[str], str | None], data_dir: str | None) -> DatasetDict:
    """Load the split `test` of a task of BIG-bench (Srivastava et al. 2022, arXiv 2206.04615) with one correct target.

    The Hub's rows have `inputs`, optionally between "Q:" and "A:", `multiple_choice_targets` and
    `multiple_choice_scores`. The original file has `examples` with `input` and `target_scores`.
    """

    def read(item: dict[str, Any]) -> Row:
        right = max(item["target_scores"], key=item["target_scores"].__getitem__)
        return {"question": item["input"].strip(), "answer": canonical(right)}

    if data_dir is not None:
        path = local_file(data_dir, name, "task.json", "task_half.json")
        return DatasetDict({"test": rows(json.loads(path.read_bytes())["examples"], read, path)})
    raw = [
        {
            "input": re.sub(r"^\s*Q:|(?:\n\s*choice:[^\n]*)*\n?\s*A:\s*$", "", item["inputs"]),
            "target_scores": dict(zip(item["multiple_choice_targets"], item["multiple_choice_scores"], strict=True)),
        }
        for item in load_dataset("hails/bigbench", f"{name}_zero_shot", split="default")
    ]
    return DatasetDict({"test": rows(raw, read, "hails/bigbench")})


def strategyqa(data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Load the split `test`, with answers "yes" and "no"; Geva et al. 2021, arXiv 2101.02235."""
    return big_bench("strategyqa", str.lower, data_dir)


def date_understanding(data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Load the split `test`, with answers as MM/DD/YYYY; the options are not shown."""
    return big_bench("date_understanding", date, data_dir)


# CommonsenseQA


def read_commonsenseqa(item: dict[str, Any]) -> Row:
    """Read `answerKey`, and question and choices in the format of the original file or of the Hub."""
    if isinstance(item["question"], str):
        return choices(item["question"], item["choices"]["text"], item["answerKey"])
    texts = [choice["text"] for choice in item["question"]["choices"]]
    return choices(item["question"]["stem"], texts, item["answerKey"])


def commonsenseqa(data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Load the validation set as split `test`; the test set has no answers. Talmor et al. 2019, arXiv 1811.00937."""
    if data_dir is None:
        raw: Any = load_dataset("tau/commonsense_qa", split="validation")
        return DatasetDict({"test": rows(raw, read_commonsenseqa, "tau/commonsense_qa")})
    path = local_file(data_dir, "commonsenseqa", "dev.jsonl", "dev_half.jsonl")
    return DatasetDict({"test": rows(json_lines(path), read_commonsenseqa, path)})
