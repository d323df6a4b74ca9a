"""Performance goals, the measured ratios, and what limits each of them, computed from the results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from . import beyond
from .rivals import AGAIN, BASE, CACHED, FLOOR, NO_ASSISTANT, PLAIN, PLAIN_PATH, SOFTCOT
from .rows import profile_shares
from .sections import BARE, BASE_AGAIN, BATCHED, DISABLED, EQUAL, SINGLE, UNEQUAL, WAITING
from .timing import Spread, ratio, shares


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Args:
        what: What is compared.
        limit: The goal.
        found: The measured value.
        limits: What limits the measured value.
        at_least: Whether larger values are better.
        unit: Unit of limit and measurement.
    """

    what: str
    limit: float
    found: Spread
    limits: str
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> str:
        """Whether the median meets the goal."""
        found = self.found.median
        return "yes" if (found >= self.limit if self.at_least else found <= self.limit) else "no"

    @property
    def columns(self) -> tuple[str, str, str, str]:
        """What is compared, the goal, the measured value, and whether the goal is met."""
        bound = f"{'at least' if self.at_least else 'at most'} {self.limit:g}{self.unit}"
        return self.what, bound, f"{self.found}{self.unit}", self.met

    def row(self) -> str:
        """Return the Markdown table row."""
        return f"| {' | '.join(self.columns)} | {self.limits} |"


def goals(sections: Mapping[str, Any]) -> Iterator[Goal]:
    """Yield the goals of the measured sections of a run."""
    for name, find in FINDERS.items():
        if name in sections:
            yield from find(sections[name]["found"])


def compared(case: Mapping[str, Any], name: str, to: str) -> Spread:
    """Return the ratio of two steps' times; for methods of similar speed, from the rounds with only these."""
    near = case["near_seconds"]
    return ratio(near if {name, to} <= near.keys() else case["seconds"], name, to)


def _training(cases: list[dict[str, Any]]) -> Iterator[Goal]:
    for case in cases:
        memory, text = case["peak_bytes"], case["text"]
        over = compared(case, SOFTCOT, FLOOR).median - 1
        floor = compared(case, FLOOR, PLAIN).median
        counted = case["multiplications"][FLOOR] / case["multiplications"][PLAIN]
        parts = ", ".join(f"{name} {share:.0%}" for name, share in shares(case["parts"]).items())
        yield Goal(
            f"training step / plain; {text}",
            0.50,
            compared(case, SOFTCOT, PLAIN),
            f"the bare operations take {floor:.2f} of plain's time, and {counted:.2f} of the multiplications of its "
            "linear layers",
        )
        yield Goal(
            f"training step / floor; {text}",
            1.08,
            compared(case, SOFTCOT, FLOOR),
            f"{over:+.0%} relative to the bare operations, which, unlike the package, store the logits; parts of "
            f"their time: {parts}",
        )
        yield Goal(
            f"training step, cached thoughts / floor without assistant; {text}",
            1.02,
            compared(case, CACHED, NO_ASSISTANT),
            f"without its assistant, the floor takes {compared(case, NO_ASSISTANT, FLOOR).median:.2f} of its time",
        )
        yield Goal(
            f"peak memory of a training step / plain; {text}",
            0.60,
            Spread.of([memory[SOFTCOT] / memory[PLAIN]]),
            f"the bare operations take {memory[FLOOR] / memory[PLAIN]:.2f} of plain's memory",
        )


def _rows(found: dict[str, Any]) -> Iterator[Goal]:
    for case in found["cases"]:
        times, counted, text = case["seconds"], case["multiplications"], case["text"]
        yield Goal(
            f"training step, two passes / one pass; {text}",
            0.50,
            ratio(times, SOFTCOT, PLAIN_PATH),
            f"the bare operations take {ratio(times, FLOOR, PLAIN_PATH).median:.2f} of one pass's time, and "
            f"{counted[FLOOR] / counted[PLAIN_PATH]:.2f} of the multiplications of its linear layers; "
            f"of the second pass's columns, {case['padding']['second_padding']:.0%} are padding and "
            f"{case['padding']['second_prompts']:.0%} prompts",
        )
        parts = ", ".join(f"{name} {share:.0%}" for name, share in profile_shares(case).items())
        yield Goal(
            f"training step, two passes / floor; {text}",
            1.05,
            ratio(times, SOFTCOT, FLOOR),
            f"the package tokenizes the assistant's prompts, which the floor is given; parts of the package's time: "
            f"{parts}; noise, the floor against itself: {ratio(times, AGAIN, FLOOR)}",
        )


def _evaluation(found: dict[str, Any]) -> Iterator[Goal]:
    times = found["seconds"]
    if f"{SOFTCOT}, {SINGLE}, {UNEQUAL}" not in times:
        return
    live = f"{SOFTCOT}, {BATCHED}, {UNEQUAL}"
    own = ratio(times, live, f"{BARE}, {BATCHED}, {UNEQUAL}").median
    waiting = ratio(times, live, f"{SOFTCOT}, {WAITING}, {UNEQUAL}").median
    limits = {
        EQUAL: f"a step of {found['at_once']} rows takes longer than a step of one row",
        UNEQUAL: f"a row is active in {found['busy']:.0%} of its batch's steps; dropping finished sequences takes "
        f"{waiting:.2f} of the time of running all rows to the end; in batches, the package takes {own:.2f} of base + "
        "assistant",
    }
    for lengths, what in limits.items():
        single, batched = (f"{SOFTCOT}, {how}, {lengths}" for how in (SINGLE, BATCHED))
        yield Goal(
            f"evaluation: one at a time / in batches; {lengths}",
            4,
            ratio(times, single, batched),
            what,
            at_least=True,
        )


def _generation(found: dict[str, Any]) -> Iterator[Goal]:
    whole, step, forward = found["generate"], found["step"], found["forward"]
    decoding = found["tokens"] * median(step[SOFTCOT]) / median(whole[SOFTCOT])
    yield Goal(
        "`generate` / base + assistant",
        1.03,
        ratio(whole, SOFTCOT, BARE),
        f"decode steps take {min(decoding, 1):.0%} of the time; with assistant and thoughts, it is "
        f"{ratio(whole, BARE, BASE).median:.2f} of the base's",
    )
    steps = {"decode step": step, "decode step of one row": found["step of one row"]}
    for name, times in steps.items():
        yield Goal(
            f"{name} / base + assistant's",
            1.02,
            ratio(times, SOFTCOT, BARE),
            f"mask and positions are shifted for the thoughts: {_added(times, SOFTCOT, BARE)}",
        )
    for name, times in (steps | {"forward": forward}).items():
        yield Goal(
            f"{name}, disabled / base's",
            1.02,
            ratio(times, DISABLED, BASE),
            f"hooks that return immediately: {_added(times, DISABLED, BASE)}; noise, the base against itself: "
            f"{ratio(times, BASE_AGAIN, BASE)}",
        )


def _added(times: Mapping[str, list[float]], name: str, to: str) -> str:
    """Format the median difference of two times in a round, relative to the second."""
    added = median(one - other for one, other in zip(times[name], times[to], strict=True))
    return f"{1e6 * added:+.0f} \N{MICRO SIGN}s relative to {1e3 * median(times[to]):.2f} ms"


def _extensions(found: dict[str, Any]) -> Iterator[Goal]:
    times, memory = found["seconds"], found["peak_bytes"]
    noise = ratio(times["prefill"], beyond.LONGER_AGAIN, beyond.LONGER)
    yield Goal(
        "prefill, base as source / base on prompt + N",
        1.10,
        ratio(times["prefill"], beyond.OWN, beyond.LONGER),
        f"the prompt runs once, N positions run twice; noise, the base against itself: {noise}",
    )
    used = memory["training"][beyond.OWN] / memory["training"][beyond.OWN_CACHED]
    yield Goal(
        "training step, base as source / its cached thoughts",
        1.05,
        ratio(times["training"], beyond.OWN, beyond.OWN_CACHED),
        f"N positions run without gradient after the prompt's cache; {used:.2f} of its memory",
    )


def _start(found: dict[str, Any]) -> Iterator[Goal]:
    slowest = ", ".join(f"`{name}` {1e3 * seconds:.0f}" for name, seconds in found["slowest"].items())
    yield Goal(
        "`import softcot_peft` after `import peft`",
        50,
        Spread.of([1e3 * seconds for seconds in found["seconds"]["import softcot_peft"]]),
        f"slowest modules, in ms: {slowest}; `import peft` takes {median(found['seconds']['import peft']):.1f} s",
        unit=" ms",
    )


FINDERS = {
    "training": _training,
    "rows": _rows,
    "evaluation": _evaluation,
    "generation": _generation,
    "start": _start,
    "extensions": _extensions,
}
