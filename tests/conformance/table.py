"""The table of families in docs/support.md, between its markers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"


@dataclass(frozen=True)
class Row:
    """What a type does.

    Args:
        model_type: The type.
        model_class: Class of the mapping.
        result: "works", or how it does not.
        traits: What is particular about it.
        remark: About the base itself, or the error.
    """

    model_type: str
    model_class: str
    result: str
    traits: tuple[str, ...]
    remark: str

    def __str__(self) -> str:
        cells = [f"`{self.model_type}`", f"`{self.model_class}`", self.result, ", ".join(self.traits), self.remark]
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def versions() -> str:
    """The versions that a table was made with."""
    return f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, peft {peft.__version__}"


def render(rows: Iterable[Row], seconds: float) -> str:
    """The table with its counts on top."""
    rows = sorted(rows, key=lambda row: row.model_type)
    results = Counter(row.result for row in rows)
    traits = Counter(trait for row in rows if row.result == "works" for trait in row.traits)
    counts = ", ".join(f"{count} {result}" for result, count in results.most_common())
    held = "; ".join(f"{trait} {count}" for trait, count in traits.most_common())
    return "\n".join(
        [
            f"{len(rows)} types: {counts}.",
            "",
            f"Made by `make conformance` in {seconds:.0f} s with {versions()}.",
            "",
            f"Types that work, by trait: {held}.",
            "",
            "| type | class | result | traits | remark |",
            "| --- | --- | --- | --- | --- |",
            *map(str, rows),
        ]
    )


def write(rows: Iterable[Row], seconds: float) -> None:
    """Replace the table in docs/support.md."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{render(rows, seconds)}\n\n{END}{after}", encoding="utf-8")


def read() -> tuple[str, dict[str, str]]:
    """The table's text above its rows, and its rows by type."""
    text = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    head, _, body = text.partition("| --- |")
    lines = [line for line in body.splitlines() if line.startswith("| `")]
    return head, {line.split("`")[1]: line for line in lines}
