"""`docs/performance.md` and its figures, from the results of all sizes and devices that lie beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from results.figures import Draw, looks, save

from . import arithmetic
from .goals import compared, goals, shares
from .rivals import AGAIN, FLOOR, PLAIN, WHAT
from .sections import FORMAT
from .sizes import SIZES
from .timing import Spread

HEAD = """# Performance

Written by `make bench`, with all its tables and figures; do not edit.

Every figure stands beside its rival's: both ran in the same process, in rounds of all rivals, each round in an order
of chance, after a warm-up. Ratios are made of the two times of one round; what is shown is their median and, in
brackets, their quartiles. Times are of forward and backward, without the optimizer, which is the same for all. Memory
is the peak above the loaded weights: on a CPU the bytes of all tensors alive at once, on CUDA the allocator's count.
Multiplications are those of linear layers, forward and backward; no attention. Weights are random, and all rivals
share them; nothing is downloaded. Every single time is in the JSON file of a run, in the folder `performance` beside
this page.

The rivals of a training step:

{rivals}

Goals are for rows and answers of one length each; those of unequal length are held against the same goals.

SoftCoT, plain SoftCoT and the floor have the same loss and the same gradient, which
`tests/examples/test_benchmarks.py` checks.
Larger models: `make bench SIZE=issue`, and `SIZE=7b` where there is an accelerator.

## What the arithmetic allows

{arithmetic}

Computed for N = 32 and a response of 150, not run. How much of a plain step is left depends on the models' shapes: the
larger the share of the head, whose logits of prompts are not needed, and the longer the prompt, the less. What a step
takes beyond its multiplications differs, too: logits of all columns are large, and memory has to be found for them.
"""
LABELS = {"thoughts": "thoughts, N", "prompt": "tokens of the prompt", "batch": "rows of a batch"}


_GENERATED = {
    "generate": "`generate`",
    "step": "decode step",
    "step of one row": "decode step of one row",
    "forward": "forward",
}


def write(docs: Path) -> None:
    """Write the page and its figures.

    Args:
        docs: Folder of `performance.md`, of the results in `performance`, and of the figures in `figures`.
    """
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    rivals = "\n".join(f"- **{name}**: {what}." for name, what in WHAT.items())
    parts = [HEAD.format(rivals=rivals, arithmetic="\n".join(arithmetic.rows()))]
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in (docs / "performance").glob("*.json")]
    runs = [results for results in runs if results.get("format") == FORMAT]
    for results in sorted(runs, key=lambda run: (run["device"], -list(SIZES).index(run["size"]))):
        parts += _run(results, docs / "figures")
    half = docs / "performance.md.half"
    half.write_text("\n".join(parts), encoding="utf-8")
    os.replace(half, docs / "performance.md")


def _run(results: Mapping[str, Any], figures: Path) -> Iterator[str]:
    sections, name = results["sections"], f"{results['size']}-{results['device']}"
    sizes = " and ".join(f"{count / 1e6:,.1f} M parameters ({what})" for what, count in results["parameters"].items())
    yield f"## Size `{results['size']}` on {results['device'].upper()}\n\n{sizes}, {SIZES[results['size']].dtype}.\n"
    yield "| what | goal | measured | met | what limits it now |\n| --- | --- | --- | --- | --- |"
    yield "\n".join(goal.row() for goal in goals(sections)) + "\n"
    for section, write_section in WRITERS.items():
        if section in sections:
            found = sections[section]["found"]
            yield f"### {section.capitalize()}\n\n{_ran(sections[section])}\n"
            yield from write_section(found, figures / f"performance-{name}")


def _ran(section: Mapping[str, Any]) -> str:
    """The command and what it ran in."""
    ran = section["environment"]
    libraries = ", ".join(f"{name} {number}" for name, number in ran["libraries"].items())
    where = ran["accelerator"] or f"{ran['processor']}, threads: {ran['threads']} on {ran['cores']} cores"
    busy = "" if ran["load"] is None else f"; load {ran['load']} before and {ran['load_after']} after"
    return f"`{section['command']}`, {ran['repeats']} rounds; {where}; {libraries}, Python {ran['python']}{busy}."


def _training(cases: list[dict[str, Any]], path: Path) -> Iterator[str]:
    for case in cases:
        times, memory, counted = case["seconds"], case["peak_bytes"], case["multiplications"]
        yield (
            f"{case['text']}:\n\n"
            "| step | ms | of plain | of the floor | peak MB | of plain | multiplications, of plain |\n"
            "| --- | --- | --- | --- | --- | --- | --- |"
        )
        for name, found in times.items():
            of_plain, of_floor = (compared(case, name, to) for to in (PLAIN, FLOOR))
            yield (
                f"| {name} | {1e3 * median(found):,.1f} | {of_plain} | {of_floor} | {memory[name] / 1e6:,.1f} "
                f"| {memory[name] / memory[PLAIN]:.2f} | {counted[name] / counted[PLAIN]:.2f} |"
            )
        parts = ", ".join(f"{name} {share:.0%}" for name, share in shares(case["parts"]).items())
        noise, near = compared(case, AGAIN, FLOOR), case["near_seconds"]
        yield (
            f"\nRounds: {len(times[FLOOR])} of all, and {len(near[FLOOR])} of {', '.join(near)} alone, of which their "
            f"ratios to each other are made. Noise of these, the floor against itself: {noise}. The floor's parts: "
            f"{parts}.\n"
        )


def _evaluation(found: dict[str, Any], path: Path) -> Iterator[str]:
    yield (
        f"{found['questions']} prompts as long as GSM8K's questions; batches of {found['at_once']}, prompts of like "
        f"length together. Greedy answers as long as GSM8K's, of at most {found['longest']} tokens, or of "
        f"{found['each']} tokens each, which are as many in all. In batches, rows whose answers have ended are not "
        "run any more (`examples/live_rows.py`), unless the name says that all are run to the end.\n"
    )
    yield from _times(found["seconds"], "all answers", 1)
    peaks = ", ".join(f"{name} {peak / 1e6:,.1f} MB" for name, peak in found["peak_bytes"].items())
    yield f"\nPeak memory of a batch: {peaks}.\n"


def _generation(found: dict[str, Any], path: Path) -> Iterator[str]:
    yield f"One batch of {found['rows']} such prompts; the forward is over the rows of a training batch.\n"
    for name, what in _GENERATED.items():
        yield from _times(found[name], what, 1e3)
        yield ""


def _times(times: Mapping[str, list[float]], what: str, scale: float) -> Iterator[str]:
    yield f"| {what} | {'s' if scale == 1 else 'ms'} |\n| --- | --- |"
    for name, found in times.items():
        values = Spread.of([scale * seconds for seconds in found])
        yield f"| {name} | {values} |"


def _start(found: dict[str, Any], path: Path) -> Iterator[str]:
    yield from _times(found["seconds"], "in a fresh process", 1e3)
    if found["files"] is None:
        yield "\nThe file system keeps no times of access, so that files read were not seen.\n"
        return
    yield "\n| files read when | of the adapter's folder | of the assistant's folder |\n| --- | --- | --- |"
    for when, folders in found["files"].items():
        cells = (", ".join(f"`{file}`" for file in folders[name]) or "none" for name in ("adapter", "assistant"))
        yield f"| {when} | {' | '.join(cells)} |"
    yield "\nThe adapter's folder held a trainer's checkpoint too, which was not read.\n"


def _growth(found: dict[str, list[dict[str, Any]]], path: Path) -> Iterator[str]:
    for kind, label, scale in (("seconds", "ms of a training step", 1e3), ("peak_bytes", "peak MB of a step", 1e-6)):
        save(_curves(found, kind, label, scale), Path(f"{path}-{kind}"), (10, 3.2))
        name = f"{path.name}-{kind}"
        shown = f"{label} against the number of thoughts, the prompt's length and the batch"
        yield (
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="figures/{name}-dark.png">'
            f'<img alt="{shown}" src="figures/{name}-light.png"></picture>\n'
        )


def _curves(found: Mapping[str, list[dict[str, Any]]], kind: str, label: str, scale: float) -> Draw:
    """One panel for each thing that grows, one line for each rival."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(found), squeeze=False)[0]
        for axis, (what, points) in zip(axes, found.items(), strict=True):
            names = list(points[0][kind])
            for name, (colour, marker) in zip(names, looks(names), strict=True):
                spreads = [_spread(point[kind][name], scale) for point in points]
                across = [point["at"] for point in points]
                own = name if axis is axes[0] else None
                axis.plot(across, [spread.median for spread in spreads], marker=marker, ms=4, color=colour, label=own)
                axis.fill_between(
                    across, [s.low for s in spreads], [s.high for s in spreads], alpha=0.15, color=colour, lw=0
                )
            axis.set(xlabel=LABELS[what], ylim=(0, None))
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes[0].set(ylabel=label)
        figure.legend(loc="outside right upper", frameon=False)

    return draw


def _spread(found: float | list[float], scale: float) -> Spread:
    return Spread.of([scale * value for value in (found if isinstance(found, list) else [found])])


WRITERS = {
    "training": _training,
    "growth": _growth,
    "evaluation": _evaluation,
    "generation": _generation,
    "start": _start,
}
