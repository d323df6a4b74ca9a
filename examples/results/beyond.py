"""The sections of `docs/results.md` on what goes beyond arXiv 2502.12134. Every number is computed from runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median

from softcot_peft import SoftCoTConfig

from .jobs import RATES, TUNING_SEED, Run, tuning
from .results import Results
from .sections import Section, better, table, worse
from .statistics import Share
from .variants import CHAINS, INITIALISATIONS, NUMBERS_OF_CHAINS, ON_STRANGERS, PARTS
from .work import VOTES_OF_CHAINS

PLAIN = "SoftCoT"  # the name of the rows of plain SoftCoT
KINDS = ("words", "strangers")


def run_of(name: str) -> dict[str, str]:
    """Return the fields of the runs of a row."""
    return {"system": "SoftCoT", "variant": "" if name == PLAIN else name}


def times_as_long(results: Results, name: str) -> float:
    """Return the training time of a variant, divided by plain SoftCoT's; median over seeds."""
    plain, other = (results.found("seconds", **run_of(row)) for row in (PLAIN, name))
    return median(b / a for a, b in zip(plain, other, strict=True))


def costs(results: Results, name: str) -> list[str]:
    """Return the cells of trained parameters and training time."""
    return [
        f"{results.median('trained_parameters', **run_of(name)):,.0f}",
        f"{times_as_long(results, name):.2f}",
    ]


def compared(shares: Mapping[str, Share]) -> str:
    """Return which shares lie wholly below plain SoftCoT's, and which wholly above."""
    below, above = ", ".join(worse(shares, PLAIN)) or "none", ", ".join(better(shares, PLAIN)) or "none"
    return f"below SoftCoT ({shares[PLAIN]}): {below}; above: {above}."


def sources(results: Results) -> Section:
    """Other thought sources and projections."""
    rows = (PLAIN, *PARTS)
    found = {kind: {name: results.share(kind=kind, **run_of(name)) for name in rows} for kind in KINDS}
    digits = {name: results.share("digits", "right", **run_of(name)) for name in rows}
    lines = [
        [
            name,
            *(found[kind][name] for kind in KINDS),
            digits[name],
            *costs(results, name),
            f"{results.rates[Run('SoftCoT', variant=run_of(name)['variant']).label]:g}",
        ]
        for name in rows
    ]
    alone = results.share(system="zero-shot")
    best = {kind: max((found[kind][name] for name in PARTS if "base" in name), key=lambda s: s.mean) for kind in KINDS}
    own = results.share("digits", "right", system="zero-shot")
    head = ["", *KINDS, "digits, adapter enabled", "trained parameters", "training time", "learning rate"]
    text = f"""Options of `SoftCoTConfig` that arXiv 2502.12134 does not have: the base as its own thought source
(`thought_source="base"`, with three initialisations of its projection), and other projections. Each has the best of
its own learning rates. SoftCoT is the method of the paper, as in the tables above.

{table(head, lines)}
Accuracy as above. Training time is relative to SoftCoT's run with the same seed, median over seeds.

**Where each loses**: whole intervals

- words: {compared(found["words"])}
- strangers: {compared(found["strangers"])}
- digits: {compared(digits)}

**The base as source.** This base never learned to read words or names: where its training examples have them, they
say a different problem than the hint in digits. Alone it solves {alone} of the problems in words. With thoughts of
its own it solves at most {best["words"]}, with the assistant's {found["words"][PLAIN]}: without a second model, nobody
reads for it. Among strangers, whose numbers neither model knows, it solves at most {best["strangers"]}, with the
assistant {found["strangers"][PLAIN]}. No kind of problem of this pair lets a base gain from reading for itself: it was
trained on problems in digits alone, and solves {own} of them without thoughts. What a large base gains from thoughts
of its own, these experiments cannot say.
"""
    return Section("Beyond the paper: sources and projections", text)


def chains(results: Results) -> Section:
    """SoftCoT++: several chains."""
    tables, losses = [], []
    for kind in KINDS:
        rows = (PLAIN, *(name for name in CHAINS if kind == "words" or name in ON_STRANGERS))
        single, votes, sampled = (
            {name: results.vote(count, "chains", how, kind=kind, **run_of(name)) for name in rows}
            for how, count in (("greedy", 1), ("greedy", max(NUMBERS_OF_CHAINS)), ("sampled", VOTES_OF_CHAINS))
        )
        alike = {name: results.found("chains", "similarity", kind=kind, **run_of(name)) for name in rows}
        lines = [
            [
                name,
                single[name],
                votes[name],
                sampled[name],
                "" if None in alike[name] else f"{mean(alike[name]):.3f}",
                *(costs(results, name) if kind == "words" else ()),
            ]
            for name in rows
        ]
        head = [kind, "single answer", "vote of K greedy answers", f"vote of {VOTES_OF_CHAINS} samples", "cosine"]
        tables.append(table(head + ["trained parameters", "training time"] * (kind == "words"), lines))
        losses += [
            f"- {kind}, {what}: {compared(shares)}"
            for what, shares in (("single answers", single), ("votes of K", votes), ("votes of samples", sampled))
        ]
    without = {name: f"{name}, no contrastive term" for name in CHAINS}
    cosine = {
        name: mean(results.found("chains", "similarity", **run_of(name))) for name in CHAINS if "= 1" not in name
    }
    lower = {name: cosine[other] - cosine[name] for name, other in without.items() if other in CHAINS}
    longest = {number: times_as_long(results, f"K = {number}, trained") for number in NUMBERS_OF_CHAINS}
    text = f"""SoftCoT++ (arXiv 2505.11484): K chains of thoughts, each from an embedding of its own at the assistant's
thought positions, **trained** with the projection or **fixed** to that of a token. The contrastive term keeps chains
apart. All have SoftCoT's learning rate.

{tables[0]}
The final result counts, on {results.sizes.sampled} problems per seed. *Single answer*: greedy, of the first chain.
*Vote of K greedy answers*: one of each chain; the first wins a tie, so two chains never outvote the first. *Vote of
{VOTES_OF_CHAINS} samples*: as many for every row, shared out between the chains, at temperature 1. *Cosine*: between
the thoughts of two chains for the same question and position; 1 means that chains are the same.

Problems whose names neither model knows:

{tables[1]}
**Where chains lose**: whole intervals

{chr(10).join(losses)}

**Costs.** Training takes {", ".join(f"{ratio:.1f} times as long with K = {k}" for k, ratio in longest.items())}
(trained embeddings), and a vote of K writes K answers.

**The contrastive term** lowers the cosine between chains in {sum(change > 0 for change in lower.values())} of
{len(lower)} pairs of rows, by {mean(lower.values()):.3f} on average (from {min(lower.values()):.3f} to
{max(lower.values()):.3f}). Its weight is 0.1 unless a row says another. The default of `SoftCoTConfig` is
`contrastive_weight={SoftCoTConfig.contrastive_weight:g}`.
"""
    return Section("Beyond the paper: several chains", text)


def initialisation(results: Results) -> Section:
    """The linear projection's initialisations at each learning rate."""
    tried = {
        (job.variant or "default", job.learning_rate): results.store[job]
        for job in tuning()
        if job.system == "SoftCoT" and job.variant in ("", *INITIALISATIONS)
    }
    kinds, rates = ("default", *INITIALISATIONS), RATES["SoftCoT"]
    rows = [[f"`{kind}`", *(said(tried[kind, rate]) for rate in rates)] for kind in kinds]

    def rank(cell: tuple[str, float]) -> tuple[float, float]:
        return sum(tried[cell]["right"]), -tried[cell]["loss"]

    best = {rate: max(((kind, rate) for kind in kinds), key=rank) for rate in rates}
    kind, rate = max(tried, key=rank)
    spread = {kind: [100 * mean(tried[kind, rate]["right"]) for rate in rates] for kind in kinds}
    steady = max(kinds, key=lambda kind: min(spread[kind]))
    text = f"""Plain SoftCoT, words, with three initialisations of the linear projection (`projection_init`). One run
per cell, on the {results.sizes.asked} problems of the seed that selects learning rates ({TUNING_SEED}), so cells that
differ by a few problems are not different. Accuracy, %, and in parentheses the loss per token:

{table(["initialisation (rows), learning rate (columns)", *(f"{rate:g}" for rate in rates)], rows)}
Best at each rate, by accuracy, then loss: {", ".join(f"`{best[rate][0]}` at {rate:g}" for rate in rates)}. Best of
all: `{kind}` at {rate:g}, {said(tried[kind, rate])}. The lowest accuracy over all rates is highest with `{steady}`
({", ".join(f"`{kind}` {min(found):.1f}" for kind, found in spread.items())}). The default of `SoftCoTConfig` is
`{SoftCoTConfig.projection_init}`.
"""
    return Section("Initialisation of the projection", text)


def said(result: Mapping[str, Sequence[int] | float]) -> str:
    """Return the cell of a run: its accuracy and loss."""
    return f"{100 * mean(result['right']):.1f} ({result['loss']:.3f})"
