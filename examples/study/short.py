"""What the study found, in short: the first section of its page, and the README's table."""

from __future__ import annotations

from dataclasses import replace

from results.sections import Section, table

from softcot_peft.analysis import CONTROLS as LABELS

from .found import Found, complete
from .jobs import Evaluation

ZERO_SHOT, LORA, SOFTCOT = ("zero-shot", "own"), ("LoRA", "own"), ("SoftCoT", "own")
OTHER, AVERAGE = ("SoftCoT", "other_question"), ("SoftCoT", "mean")
DIFFERENCES = {
    "SoftCoT minus zero-shot": (SOFTCOT, ZERO_SHOT),
    f"SoftCoT minus {LABELS['other_question']}": (SOFTCOT, OTHER),
    f"SoftCoT minus {LABELS['mean']}": (SOFTCOT, AVERAGE),
    "LoRA minus zero-shot": (LORA, ZERO_SHOT),
}


def evaluated(found: Found, pair: str, system: str, control: str = "own") -> list[Evaluation]:
    """Return the evaluations of a pair's system on GSM8K, by seed."""
    if pair != "A":
        return [replace(found.final.other(pair, system), control=control)]
    return found.final.headline(system) if control == "own" else found.final.controls(control)


def in_short(found: Found) -> Section | None:
    """What SoftCoT gains in each pair, and what of it depends on the question."""
    rows: list[list[object]] = []
    depends = []
    for name, (one, other) in DIFFERENCES.items():
        cells = []
        for pair in found.final.pairs:
            cells.append(found.difference(evaluated(found, pair, *one), evaluated(found, pair, *other)))
            if other == OTHER and cells[-1] and cells[-1].beyond_chance:
                depends.append(pair)
        rows.append([name, *cells])
    rows = complete(rows)
    if not rows:
        return None
    asked = {pair: found.right(evaluated(found, pair, "SoftCoT")) for pair in found.final.pairs}
    counts = ", ".join(f"{pair} {len(right[0])}" for pair, right in asked.items() if right)
    verdict = f"in pair {', '.join(depends)}" if depends else "in no pair"
    text = f"""GSM8K, points of right answers, with 95 % intervals over questions, paired. Test questions: {counts}.
Pair A has the mean over its seeds. The first row is what SoftCoT gains, the second what of it depends on the question:
its interval excludes 0 {verdict}.

{table(["difference", *(f"pair {pair}" for pair in found.final.pairs)], rows)}"""
    return Section("In short", text)


def for_readme(found: Found) -> str | None:
    """Return the table of pairs A and B for the README."""
    pairs = [pair for pair in ("A", "B") if pair in found.final.pairs]
    systems = {
        "base alone": ZERO_SHOT,
        "SoftCoT": SOFTCOT,
        f"SoftCoT, {LABELS['other_question']} as thoughts": OTHER,
        f"SoftCoT, {LABELS['mean']} thoughts": AVERAGE,
        "LoRA": LORA,
    }
    shares = {
        name: [found.share(evaluated(found, pair, *system)) for pair in pairs] for name, system in systems.items()
    }
    rows = complete([name, *cells] for name, cells in shares.items())
    head = ["GSM8K, right answers, % [95 % interval]", *(f"pair {pair}" for pair in pairs)]
    return table(head, rows) if rows else None
