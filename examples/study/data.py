"""The questions of the study, in splits that never overlap.

The validation part is a tenth of the training file, chosen by a hash of the question; the rest is the training part.
Test questions that also occur in the training file are left out. The order of each split is that of the hashes, so
the first questions of a split are a random sample of it.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import Any

from .tasks import FOLDER as FOLDER  # puts `evaluation` on the path

from evaluation import data  # isort: skip

Row = dict[str, Any]
HAVE_TRAINING = ("gsm8k", "commonsenseqa")


def digest(question: str) -> str:
    """Return a hash of a question's words, so that spacing and case do not make another question."""
    return hashlib.sha256(" ".join(re.findall(r"\w+", question.lower())).encode()).hexdigest()


def training_file(task: str, data_dir: str | None) -> list[Row]:
    """Return the rows of a task's training file."""
    if task == "gsm8k":
        return list(data.gsm8k(data_dir)["train"])
    if data_dir is None:
        raw: Any = data.load_dataset("tau/commonsense_qa", split="train")
        return list(data.rows(raw, data.read_commonsenseqa, "tau/commonsense_qa"))
    path = data.local_file(data_dir, "commonsenseqa", "train.jsonl")
    return list(data.rows(data.json_lines(path), data.read_commonsenseqa, path))


def in_order(rows: list[Row]) -> list[Row]:
    """Return one row per question, in the order of their hashes."""
    return [row for _, row in sorted({digest(row["question"]): row for row in rows}.items())]


@lru_cache(8)
def split(task: str, part: str, data_dir: str | None) -> list[Row]:
    """Return a split of a task.

    Args:
        task: A task of `evaluation/`.
        part: `"training"`, `"validation"` or `"test"`.
        data_dir: Folder of the original files, or None for the Hub.

    Raises:
        ValueError: The task has no training file.
    """
    if part == "test":
        tested = in_order(list(getattr(data, task)(data_dir)["test"]))
        known = {digest(row["question"]) for row in training_file(task, data_dir)} if task in HAVE_TRAINING else set()
        return [row for row in tested if digest(row["question"]) not in known]
    if task not in HAVE_TRAINING:
        raise ValueError(f"`task` must be one with a training file, {' or '.join(HAVE_TRAINING)}, got {task!r}.")
    validation = part == "validation"
    # the last digits, because the first ones give the order
    rows = in_order(training_file(task, data_dir))
    return [row for row in rows if (int(digest(row["question"])[-8:], 16) % 10 == 0) == validation]
