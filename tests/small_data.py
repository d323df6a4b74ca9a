"""A few made-up rows of every data set, in the publishers' own formats; and where whole data sets may lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from project_files import ROOT

DATA = Path(os.environ.get("SOFTCOT_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no data beside the project, nor in SOFTCOT_DATA")

GSM8K = [
    {"question": "Ann has 3 pears and buys 9. How many?", "answer": "She has 3 + 9 = <<3+9=12>>12.\n#### 12"},
    {"question": "Bo sold 1,200 nails at $2 each. What did he get?", "answer": "1200 * 2 = 2400.\n#### $2,400"},
    {"question": "Cy runs 5 miles a day. How far in 3 days?", "answer": "5 * 3 = <<5*3=15>>15.\n#### 15"},
]
ASDIV = [
    ("Nine birds sat on a wire and 4 came.", "How many birds are there?", "13 (birds)", "9+4=13"),
    ("Dee has 20 cards and gave 6 away.", "How many are left?", "14 (cards)", "20-6=14"),
    ("Class starts at 9:10 and lasts 45 minutes.", "When does it end?", "9:55", "9:10+45=9:55"),
]
AQUA = [
    {"question": "What is half of 18?", "options": ["A)7", "B)8", "C)9", "D)10", "E)11"], "correct": "C"},
    {"question": "What is 2 cubed?", "options": ["A)6", "B)8", "C)9", "D)4", "E)16"], "correct": "B"},
    {"question": "Which is odd?", "options": ["A)2", "B)4", "C)6", "D)8", "E)none"], "correct": "E"},
]
STRATEGYQA = [
    {"input": "Can a cork swim?", "target_scores": {"Yes": 1, "No": 0}, "target": "Yes. Cork is light."},
    {"input": "Do hens have four legs?", "target_scores": {"Yes": 0, "No": 1}, "target": "No. Hens have two."},
    {"input": "Is ice cold to touch?", "target_scores": {"Yes": 1, "No": 0}, "target": "Yes."},
]
DATES = [
    {"input": "Today is May 3, 2020. What is tomorrow?", "target_scores": {"05/04/2020": 1, "05/02/2020": 0}},
    {"input": "It is 1/31/2019. What is tomorrow?", "target_scores": {"02/01/2019": 1, "01/30/2019": 0}},
    {"input": "Tomorrow is June 9, 2018. What is today?", "target_scores": {"06/10/2018": 0, "06/08/2018": 1}},
]
COMMONSENSEQA = [
    {"stem": "Where do hens lay?", "texts": ["moon", "nest", "sea", "shoe", "bus"], "answerKey": "B"},
    {"stem": "What do you sit on?", "texts": ["chair", "rain", "song", "soup", "idea"], "answerKey": "A"},
    {"stem": "What flies by night?", "texts": ["sofa", "spoon", "stone", "owl", "lamp"], "answerKey": "D"},
]


def commonsenseqa_rows() -> list[dict[str, Any]]:
    """As in the publishers' file."""
    return [
        {
            "answerKey": row["answerKey"],
            "question": {
                "stem": row["stem"],
                "choices": [{"label": "ABCDE"[i], "text": text} for i, text in enumerate(row["texts"])],
            },
        }
        for row in COMMONSENSEQA
    ]


def asdiv_xml() -> str:
    problems = "".join(
        f"<Problem><Body>{body}</Body><Question>{question}</Question><Answer>{answer}</Answer>"
        f"<Formula>{formula}</Formula></Problem>"
        for body, question, answer, formula in ASDIV
    )
    return f"<Corpus><ProblemSet>{problems}</ProblemSet></Corpus>"


def write_data(folder: Path) -> Path:
    """All files in one folder."""

    def lines(rows: list[dict[str, Any]]) -> str:
        return "\n".join(map(json.dumps, rows)) + "\n"

    files = {
        "gsm8k/train.jsonl": lines(GSM8K),
        "gsm8k/test_half.jsonl": lines(GSM8K),
        "asdiv/ASDiv.xml": asdiv_xml(),
        "aqua/test_half.jsonl": lines(AQUA),
        "strategyqa/task_half.json": json.dumps({"examples": STRATEGYQA}),
        "date_understanding/task_half.json": json.dumps({"examples": DATES}),
        "commonsenseqa/dev_half.jsonl": lines(commonsenseqa_rows()),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder
