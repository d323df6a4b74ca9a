"""What is chosen on the validation part, and how it gets into docs/real-models-protocol.md and out of it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blocks import write_block
from results.sections import table
from results.store import Store

from .jobs import TRAINED, Evaluation, Training
from .plan import FIRST_RATES, Sizes, pilot, rates_of, searched, style, tried, tries

NAME = "real-models-protocol.md"
BLOCK = "choices"
# Reported, but not to be chosen: other rows, other costs, or no assistant.
EXCLUDED = ("human rationales to the same questions", "twice as many steps", "base as source")
SHARED = ("rationales", "steps", "batch", "warmup", "thoughts")  # what the other systems take from SoftCoT


def fields(training: Training) -> dict[str, Any]:
    """Return the fields that are chosen: those that differ from the defaults, and the most important ones."""
    plain = asdict(Training())
    always = ("rationales", "learning_rate", "steps", "batch", "thoughts", "validated")
    left_out = ("pair", "system", "seed")
    found = asdict(training).items()
    return {name: value for name, value in found if name not in left_out and (value != plain[name] or name in always)}


def choices(rates: Mapping[str, float], best: Mapping[str, Any], sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Return the settings of each trained system.

    Args:
        rates: Learning rates that the pilot chose.
        best: Fields of the best try; the other systems share the rationales, N and the length of training.
        sizes: Size of the study.
    """
    plain = {"steps": sizes.steps, "batch": sizes.batch, "validated": sizes.validated}
    shared = {name: best[name] for name in SHARED if name in best}
    found = {system: fields(Training(**(plain | {"learning_rate": rates[system]} | shared))) for system in TRAINED}
    found["SoftCoT"] = fields(Training(**(plain | {"learning_rate": rates["SoftCoT"]} | dict(best))))
    return found


def outcome(store: Store, training: Training, sizes: Sizes) -> dict[str, float] | None:
    """Return right answers and losses of a try; None if it is not finished."""
    evaluations = tried(training, sizes)
    if training not in store or not all(each in store for each in evaluations.values()):
        return None
    losses = store[training]["losses"]
    right = {control: store[each]["right"] for control, each in evaluations.items()}
    return {
        "asked": len(right["own"]),
        "right": sum(right["own"]),
        "other": sum(right["other_question"]),
        "tokens": store[evaluations["own"]]["tokens"],
        "loss": losses["own"],
        "gap_other": losses["other_question"] - losses["own"],
        "gap_mean": losses["mean"] - losses["own"],
    }


def best_try(store: Store, rates: Mapping[str, float], sizes: Sizes) -> tuple[str, Training]:
    """Return the chosen try: of those within one standard error of the most right answers, the largest loss gap.

    The gap is the loss per token with another question's thoughts minus that with the question's own. Few questions
    can be answered in a pilot; the gap is measured on every token, so it tells tries apart that accuracy does not.

    Raises:
        ValueError: A try is not finished.
    """
    found: dict[str, dict[str, float]] = {}
    every = tries(rates["SoftCoT"], sizes)
    for name, training in every.items():
        result = outcome(store, training, sizes)
        if result is None:
            raise ValueError(f"The tries must be finished, but {name!r} is not.")
        if name not in EXCLUDED:
            found[name] = result
    most = max(each["right"] for each in found.values())
    asked = next(iter(found.values()))["asked"]
    error = (most * (asked - most) / asked) ** 0.5
    close = {name: each for name, each in found.items() if each["right"] >= most - error}
    name = max(close, key=lambda each: (close[each]["gap_other"], close[each]["right"]))
    return name, every[name]


def rate_rows(store: Store, sizes: Sizes) -> list[list[object]]:
    """Return the rows of the table of learning rates that are finished."""
    rows: list[list[object]] = []
    for system in FIRST_RATES:
        rates, best = searched(system, store, sizes)
        for rate in rates:
            job = pilot(system, rate, sizes)
            if job in store:
                mark = " **chosen**" if rate == best else ""
                result = store[job]
                rows.append([system, f"{rate:g}{mark}", f"{result['before']:.3f}", f"{result['losses']['own']:.3f}"])
    return rows


def try_rows(store: Store, sizes: Sizes) -> list[list[object]]:
    """Return the rows of the table of tries that are finished."""
    rows: list[list[object]] = []
    if any(searched(system, store, sizes)[1] is None for system in FIRST_RATES):
        return rows
    for name, training in tries(rates_of(store, sizes)["SoftCoT"], sizes).items():
        result = outcome(store, training, sizes)
        if result is not None:
            shares = [f"{100 * result[each] / result['asked']:.1f}" for each in ("right", "other")]
            gaps = [f"{result[each]:+.3f}" for each in ("gap_other", "gap_mean")]
            rows.append([name, *shares, f"{result['loss']:.3f}", *gaps, f"{result['tokens']:.0f}"])
    for job in style(rates_of(store, sizes), sizes):
        if isinstance(job, Evaluation) and job in store:
            right, loss = store[job]["right"], ""
            if job.training is not None and job.training in store:
                loss = f"{store[job.training]['losses']['own']:.3f}"
            kind = {"own": ", own rationales", "human_same": ", human rationales"}
            name = f"*{job.system}{kind[job.training.rationales] if job.training else ''}*"
            share = f"{100 * sum(right) / len(right):.1f}"
            rows.append([name, share, "", loss, "", "", f"{store[job]['tokens']:.0f}"])
    return rows


RATE_HEAD = ("system", "learning rate", "loss before", "loss after")
TRY_HEAD = (
    "SoftCoT, validation part",
    "right, %",
    "with another question's thoughts, %",
    "loss",
    "loss with another question's, more",
    "loss with average thoughts, more",
    "tokens per answer",
)


def summary(store: Store, sizes: Sizes) -> str:
    """Return the tables of what is finished, and the choices if all is."""
    tables = (RATE_HEAD, rate_rows(store, sizes)), (TRY_HEAD, try_rows(store, sizes))
    parts = [table(head, rows) for head, rows in tables if rows]
    try:
        rates = rates_of(store, sizes)
        name, training = best_try(store, rates, sizes)
    except ValueError as error:
        return "\n".join([*parts, f"Not chosen yet: {error}\n"])
    chosen = json.dumps(choices(rates, fields(training), sizes), indent=1)
    return "\n".join([*parts, f"Chosen: {name}.\n", f"```json\n{chosen}\n```\n"])


def write(docs: Path, store: Store, sizes: Sizes) -> str:
    """Write the choices into the protocol, and return them.

    Raises:
        ValueError: Pilot or tries are not finished, or the protocol lacks the block.
    """
    best_try(store, rates_of(store, sizes), sizes)
    text = summary(store, sizes)
    write_block(docs / NAME, BLOCK, text)
    return text


def read(docs: Path) -> dict[str, dict[str, Any]]:
    """Return the choices of the protocol.

    Raises:
        ValueError: There is no protocol, or it has no choices yet.
    """
    page = docs / NAME
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    block = text.partition(f"<!-- {BLOCK}:begin -->\n")[2].partition(f"<!-- {BLOCK}:end -->")[0]
    chosen = block.partition("```json\n")[2].partition("\n```")[0]
    if not chosen:
        raise ValueError(
            f"`--part final` uses the test files, so {page} must list all choices first. Run the parts before it, "
            "then `--part protocol`, and commit the page."
        )
    found: dict[str, dict[str, Any]] = json.loads(chosen)
    return found
