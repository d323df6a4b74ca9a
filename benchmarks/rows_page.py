"""Writes what `rows.py` has measured, for `docs/performance.md`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from .rivals import AGAIN, FLOOR, PLAIN_PATH, SOFTCOT
from .rows import profile_shares, speeds
from .timing import ratio, shares


def write_rows(found: Mapping[str, Any], path: Path) -> Iterator[str]:
    """Yield the Markdown of the section."""
    yield (
        f"The {found['rows']:,} rows of GSM8K's training file, as `examples/train_gsm8k.py` encodes them. The first "
        "pass runs the prompts forward, the second one thoughts and responses forward and backward, each padded to "
        "the longest row. Where it is cheaper, rows are divided at the shortest prompt of their batch, so that the "
        "second pass has parts of prompts, too. All batches:\n\n"
        "| order | columns per row, first pass | padding | columns per row, second pass | padding | prompts |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for order, share in found["padding"].items():
        yield (
            f"| {order} | {share['first_columns']:.0f} | {share['first_padding']:.0%} | {share['second_columns']:.0f} "
            f"| {share['second_padding']:.0%} | {share['second_prompts']:.0%} |"
        )
    yield "\nTimes are those of the batch with the median number of columns.\n"
    for case in found["cases"]:
        yield from _case(case)


def _case(case: Mapping[str, Any]) -> Iterator[str]:
    times, memory, counted, apart = (case[name] for name in ("seconds", "peak_bytes", "multiplications", "agreement"))
    yield (
        f"{case['text']}:\n\n"
        f"| step | s | / {PLAIN_PATH} | / floor | peak MB | / {PLAIN_PATH} | multiplications / {PLAIN_PATH} |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    for name, found in times.items():
        same = FLOOR if name == AGAIN else name
        yield (
            f"| {name} | {median(found):.2f} | {ratio(times, name, PLAIN_PATH)} | {ratio(times, name, FLOOR)} "
            f"| {memory[same] / 1e6:,.1f} | {memory[same] / memory[PLAIN_PATH]:.2f} "
            f"| {counted[same] / counted[PLAIN_PATH]:.2f} |"
        )
    padding, (loss, rest) = case["padding"], speeds(case)
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares(case["parts"]).items())
    profile = ", ".join(f"{name} {share:.0%}" for name, share in profile_shares(case).items())
    losses = ", ".join(f"{name} {value:.4f}" for name, value in apart["loss"].items())
    furthest = max(apart["gradient"].values())
    yield (
        f"\nParts of the floor: {parts}. Parts of SoftCoT's step: {profile}; the loss runs at {loss:,.0f} GFLOP/s, "
        f"what is neither loss nor attention at {rest:,.0f}. Padding: {padding['first_padding']:.0%} of the "
        f"columns of the first pass, {padding['second_padding']:.0%} of the second, in which prompts take another "
        f"{padding['second_prompts']:.0%}. Losses: {losses}; gradients differ from {SOFTCOT}'s by at most "
        f"{furthest:.1%} of its norm.\n"
    )
