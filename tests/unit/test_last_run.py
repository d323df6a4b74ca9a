"""The rows of docs/support.md that long suites write."""

from __future__ import annotations

from collections import Counter

import last_run
import pytest
from project_files import ROOT


@pytest.mark.parametrize("target", ["make conformance", "make serving", "make fuzz"])
def test_every_long_suite_has_a_row_that_its_target_writes(target: str) -> None:
    page = last_run.PAGE.read_text(encoding="utf-8")
    changed = last_run.replace_row(page, target, "1 | 2")
    old, new = page.splitlines(), changed.splitlines()
    (place,) = [number for number, line in enumerate(old) if line != new[number]]
    assert old[place].startswith(f"| `{target}` |")
    assert new[place] == old[place].rpartition(" | ")[0] + " | 1 / 2 |"
    assert f'--last-run "{target}"' in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_an_unknown_row_is_refused() -> None:
    with pytest.raises(ValueError, match="make coffee"):
        last_run.replace_row("| `make fuzz` | a | b |\n", "make coffee", "")


def test_a_run_is_summed_up() -> None:
    counts = {"passed": 1234, "failed": 0, "skipped": 3}
    cell = last_run.summary(counts, Counter({"no GPU": 2, "no engine": 1}), 20160, 600.0)
    assert cell.startswith("1,234 passed, 3 skipped, 20,160 random cases; 10 min; torch ")
    assert cell.endswith(". Skipped: no GPU (2), no engine (1)")
