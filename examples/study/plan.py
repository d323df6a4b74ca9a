"""The jobs of each part of the study, and how long they take.

Parts, in their order: `rationales` (bases write rationales of their own), `pilot` (learning rate of each system),
`tries` (what raises the share of SoftCoT's gain that depends on the question), all on the training file; `final` (the
test files, with the settings that docs/real-models-protocol.md lists).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from results.store import Store

from .jobs import PAIRS, TRAINED, Evaluation, Job, Probe, Spread, Training, Writing, asked

PARTS = ("rationales", "pilot", "tries", "final")
FIRST_RATES = {
    "prompt tuning": (1e-3, 3e-3, 1e-2),
    "placeholders": (1e-3, 3e-3, 1e-2),
    "LoRA": (1e-4, 3e-4, 1e-3),
    "SoftCoT": (3e-4, 1e-3, 3e-3),
}
CARRIED_RATES = (1e-4, 1e-3)
CONTROLS = ("other_question", "mean", "zero")  # beside every SoftCoT figure; the headline has all
ALL_CONTROLS = (*CONTROLS, "random_projection")
# Seconds on two cores in bfloat16, by the size of the base: of a training row and of an answer in a batch of 16. A
# medium base has 0.5 billion parameters; the others are scaled by theirs.
ROW = {"small": 0.35, "medium": 1.1, "large": 3.2}
ANSWER = {"small": 1.0, "medium": 2.7, "large": 8.0}
LOSS = 0.35  # of a row's loss, relative to its training
STARTING = 6.0  # loading and saving


@dataclass(frozen=True)
class Sizes:
    """Size of the study; tests use a smaller one.

    Args:
        written: Questions that each base answers for rationales of its own, in jobs of at most `stretch`.
        stretch: Questions of one such job.
        pilot_steps: Optimizer steps of the search for learning rates.
        wider: How many rates the search begins with beyond the first ones, on each side.
        extended: How many rates it may add to these.
        steps: Optimizer steps of all other training.
        batch: Rows per step.
        validated: Rows of the validation part whose loss is computed.
        tried: Questions of the validation part per try.
        seeds: Of the headline's `seeded` systems; all others have the first one.
        seeded: Trained systems with several seeds.
        headline: Test questions of GSM8K for pair A.
        compared: Test questions of GSM8K for the other pairs.
        transferred: Test questions of each of the other tasks.
        voted: Questions of self-consistency.
        samples: Answers that vote.
        numbers: N.
        gridded: Questions of each cell of N in training by N at inference.
        carried: Pairs whose thoughts are trained in every way that could carry more of the question.
        carried_plain: Pairs whose thoughts are trained so without any of these ways.
        carried_steps: Optimizer steps of that training, at each of `CARRIED_RATES`.
        diagnosed: Questions whose thoughts are described.
        probed: Questions of the probe.
    """

    written: tuple[tuple[str, int], ...] = (("medium", 768), ("large", 128))
    stretch: int = 256
    pilot_steps: int = 12
    wider: int = 0
    extended: int = 6
    steps: int = 40
    batch: int = 8
    validated: int = 32
    tried: int = 20
    seeds: tuple[int, ...] = (0, 1, 2)
    seeded: tuple[str, ...] = ("LoRA", "SoftCoT")
    headline: int = 80
    compared: int = 24
    transferred: int = 20
    voted: int = 20
    samples: int = 5
    numbers: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    gridded: int = 10
    carried: tuple[str, ...] = ("C",)
    carried_plain: tuple[str, ...] = ()
    carried_steps: int = 14
    diagnosed: int = 16
    probed: int = 400


# For an accelerator: longer training, and all test questions of GSM8K for pairs A and D.
FULL = Sizes(
    written=(("medium", 1536), ("large", 512)),
    stretch=384,
    pilot_steps=60,
    wider=1,
    steps=60,
    validated=64,
    tried=160,
    seeded=TRAINED,
    headline=660,
    compared=120,
    transferred=60,
    voted=60,
    gridded=32,
    carried_plain=("A",),
    carried_steps=160,
    diagnosed=64,
    probed=600,
)
SMALL = Sizes(
    written=(("medium", 6), ("large", 4)),
    stretch=4,
    pilot_steps=1,
    extended=1,
    steps=1,
    batch=2,
    validated=2,
    tried=2,
    seeds=(0, 1),
    headline=2,
    compared=2,
    transferred=2,
    voted=2,
    samples=2,
    numbers=(1, 8),
    gridded=2,
    carried_steps=1,
    diagnosed=2,
    probed=10,
)


def seconds(job: Job) -> float:
    """Return the estimated time of a job."""
    if isinstance(job, Writing):
        return STARTING + job.count * ANSWER[job.base]
    if isinstance(job, Training):
        base, source = PAIRS[job.pair]
        rows = job.steps * job.batch * (2 if job.contrast else 1)
        losses = job.validated * LOSS * (6 if job.system == "SoftCoT" else 2)
        reading = job.steps * job.batch * LOSS * ROW[source] if job.system == "SoftCoT" else 0
        return STARTING + (rows + losses) * ROW[base] + reading
    if isinstance(job, Evaluation):
        base, source = PAIRS[job.pair]
        hints = 0.4 * job.count * ANSWER[source] if job.system == "Assist-CoT" else 0
        short = 0.3 if job.control == "zero" else 0.75 if job.training else 1  # right and empty answers are short
        return STARTING + short * job.count * job.samples * ANSWER[base] + hints
    if isinstance(job, Probe | Spread):
        return STARTING + job.count * LOSS * ROW[PAIRS[job.pair][1]]
    return STARTING + 2.2 * job.count * ANSWER[PAIRS[job.training.pair][0]]


def writings(sizes: Sizes, available: Iterable[str]) -> dict[str, tuple[Writing, ...]]:
    """Return the jobs that write rationales, by base."""
    found = {}
    for base, count in sizes.written:
        if base in available:
            starts = range(0, count, sizes.stretch)
            found[base] = tuple(Writing(base, first, min(sizes.stretch, count - first)) for first in starts)
    return found


def needs(job: Job, writings: Mapping[str, tuple[Writing, ...]]) -> tuple[Job, ...]:
    """Return the jobs whose results a job reads, given those that write rationales, by base."""
    if isinstance(job, Training):
        return () if job.rationales == "human" else writings[PAIRS[job.pair][0]]
    training = getattr(job, "training", None)
    return () if training is None else (training,)


# Pilot


def step_of(rate: float, by: int) -> float:
    """Return the next rate on the ladder 1, 3, 10, 30, ..., up for 1 and down for -1."""
    exponent = 0
    while rate < 0.99:
        rate, exponent = rate * 10, exponent - 1
    lead = 1 if rate < 2 else 3
    place = 2 * exponent + (lead == 3) + by
    return float(f"{(3 if place % 2 else 1)}e{place // 2}")


def first_rates(system: str, sizes: Sizes) -> list[float]:
    """Return the rates that the search begins with, from low to high."""
    rates = list(FIRST_RATES[system])
    for _ in range(sizes.wider):
        rates = [step_of(rates[0], -1), *rates, step_of(rates[-1], 1)]
    return rates


def pilot(system: str, rate: float, sizes: Sizes) -> Training:
    """Return the run of a system with a learning rate, on human rationales of pair A."""
    fixed = {"steps": sizes.pilot_steps, "batch": sizes.batch, "validated": sizes.validated}
    return Training(system=system, learning_rate=rate, **fixed)  # type: ignore[arg-type]


def searched(system: str, store: Store, sizes: Sizes) -> tuple[list[float], float | None]:
    """Return the rates to try now, from low to high, and the best one once a worse one lies on both sides."""
    rates = first = first_rates(system, sizes)
    while all(pilot(system, rate, sizes) in store for rate in rates):
        losses = [store[pilot(system, rate, sizes)]["losses"]["own"] for rate in rates]
        place = losses.index(min(losses))
        new = {0: step_of(rates[0], -1), len(rates) - 1: step_of(rates[-1], 1)}.get(place)
        if new is None or len(rates) == len(first) + sizes.extended:
            return rates, rates[place]
        rates = sorted([*rates, new])
    return rates, None


def pilots(store: Store, sizes: Sizes) -> list[Training]:
    """Return the runs of the pilot that are known so far; more may follow when these are finished."""
    return [pilot(system, rate, sizes) for system in TRAINED for rate in searched(system, store, sizes)[0]]


def rates_of(store: Store, sizes: Sizes) -> dict[str, float]:
    """Return the chosen learning rates.

    Raises:
        ValueError: The pilot is not finished.
    """
    found = {system: searched(system, store, sizes)[1] for system in TRAINED}
    if missing := [system for system, rate in found.items() if rate is None]:
        raise ValueError(f"The pilot must be finished, but it has no learning rate for {', '.join(missing)} yet.")
    return {system: rate for system, rate in found.items() if rate is not None}


# Tries


def tries(rate: float, sizes: Sizes) -> dict[str, Training]:
    """Return SoftCoT with own rationales, and with one thing changed at a time, by what is changed."""
    fixed: dict[str, Any] = {"steps": sizes.steps, "batch": sizes.batch, "validated": sizes.validated}
    plain = Training(rationales="own", learning_rate=rate, **fixed)
    return {
        "plain": plain,
        "human rationales to the same questions": replace(plain, rationales="human_same"),
        "lower learning rate": replace(plain, learning_rate=step_of(rate, -1)),
        "higher learning rate": replace(plain, learning_rate=step_of(rate, 1)),
        "longer warm-up": replace(plain, warmup=0.5),
        "thoughts as long as embeddings": replace(plain, projection_init="matched"),
        "no lead-in": replace(plain, lead_in=False),
        "two thirds of the assistant's layers": replace(plain, depth=2 / 3),
        "N = 2": replace(plain, thoughts=2),
        "N = 32": replace(plain, thoughts=32),
        "per-position projection": replace(plain, projection="per_position"),
        "two-layer projection": replace(plain, projection="mlp"),
        "standardized states": replace(plain, standardized=True, projection_init="matched"),
        "trained embedding at the assistant's positions": replace(plain, chain_init="trained"),
        "states of the question's tokens": replace(plain, thought_source="question_stretches"),
        "contrastive term": replace(plain, contrast=1.0),
        "contrastive term, thoughts as long as embeddings": replace(plain, contrast=1.0, projection_init="matched"),
        "twice as many steps": replace(plain, steps=2 * sizes.steps),
        "base as source": replace(plain, thought_source="base"),
    }


def carried(sizes: Sizes) -> dict[tuple[str, str, bool], list[Training]]:
    """Return trainings of SoftCoT in ways that could carry more of the question, with each rate.

    The keys are the pair, what is changed, and whether the base reads the question. If it does not, all that it can
    know of the question comes from the thoughts.
    """
    found = {}
    for pair in (*sizes.carried, *sizes.carried_plain):
        plain = Training(pair=pair, steps=sizes.carried_steps, batch=sizes.batch, validated=sizes.validated)
        spread = replace(plain, standardized=True, projection_init="matched")
        changed = {
            "plain": plain,
            "standardized states": spread,
            "states of the question's tokens, standardized": replace(spread, thought_source="question_stretches"),
            "trained embedding at the assistant's positions": replace(plain, chain_init="trained"),
            "standardized states, contrastive term": replace(spread, contrast=1.0),
        }
        for name, training in changed.items():
            if pair in sizes.carried_plain and training != plain:
                continue
            for reads in (True, False):
                if reads or not (training.chain_init or training.contrast):
                    each = replace(training, blind=not reads)
                    found[pair, name, reads] = [replace(each, learning_rate=rate) for rate in CARRIED_RATES]
    return found


def tried(training: Training, sizes: Sizes) -> dict[str, Evaluation]:
    """Return the evaluations of a try, by control."""
    fixed: dict[str, Any] = {"split": "validation", "count": sizes.tried}
    return {control: asked(training, control=control, **fixed) for control in ("own", "other_question")}


def style(rates: Mapping[str, float], sizes: Sizes) -> list[Job]:
    """Return what the tries are compared with on the validation part: the base, and placeholders on the same rows."""
    jobs: list[Job] = [Evaluation("A", "zero-shot", split="validation", count=sizes.tried)]
    for rationales in ("own", "human_same"):
        plain = replace(tries(rates["placeholders"], sizes)["plain"], system="placeholders", rationales=rationales)
        jobs += [plain, asked(plain, split="validation", count=sizes.tried)]
    return jobs


def spreads(sizes: Sizes) -> list[Spread]:
    """Return how far the states differ that are projected: of both smaller models as assistants, and of the base."""
    return [
        Spread("A", count=sizes.diagnosed),
        Spread("D", count=sizes.diagnosed),
        Spread("A", "base", sizes.diagnosed),
    ]


def all_tries(rates: Mapping[str, float], sizes: Sizes) -> list[Job]:
    """Return all jobs of the tries."""
    jobs: list[Job] = [*spreads(sizes), *style(rates, sizes)]
    for training in tries(rates["SoftCoT"], sizes).values():
        jobs += [training, *tried(training, sizes).values()]
    return jobs + [training for trainings in carried(sizes).values() for training in trainings]


def hours(jobs: Sequence[Job], cost: Callable[[Job], float] = seconds) -> float:
    """Return the estimated hours of jobs."""
    return sum(map(cost, jobs)) / 3600
