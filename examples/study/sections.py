"""The sections of `docs/real-models.md`. Every number is computed from results; what is not finished is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from results.figures import bars, heat
from results.sections import Section, table
from results.statistics import Share, share, votes

from softcot_peft.analysis import CONTROLS as LABELS

from . import plan
from .found import Found, complete
from .jobs import PAIRS, TRAINED, TRANSFERS, UNTRAINED, Evaluation
from .plan import ALL_CONTROLS, CONTROLS
from .protocol import RATE_HEAD, TRY_HEAD, rate_rows, try_rows
from .short import in_short


def known(shares: Mapping[str, Share | None]) -> dict[str, Share]:
    """Return the shares that are there."""
    return {name: each for name, each in shares.items() if each is not None}


def headline(found: Found) -> Section | None:
    """All systems and controls for pair A on GSM8K."""
    jobs = {system: found.final.headline(system) for system in (*UNTRAINED, *TRAINED)}
    jobs |= {f"SoftCoT, {LABELS[control]}": found.final.controls(control) for control in ALL_CONTROLS}
    shares = {name: found.share(each) for name, each in jobs.items()}
    rows = complete(
        [name, shares[name], len(each) if shares[name] else None, found.tokens(each) or None]
        for name, each in jobs.items()
    )
    if not rows:
        return None
    text = f"""Pair A, GSM8K, {found.sizes.headline} test questions, greedy:

{table(["system", "right, % [95 % interval]", "seeds", "tokens per answer"], rows)}
The rows below SoftCoT are the same trained adapters with other vectors in the place of the thoughts. The share of a
gain that depends on the question is the difference to *{LABELS["other_question"]}*.
"""
    drawn = bars({"GSM8K, pair A": known(shares)})
    return Section("Accuracy", text, {"real_accuracy": (drawn, (7, 3.6), "Accuracy by system and control")})


def paired_tests(found: Found) -> Section | None:
    """McNemar's tests of SoftCoT against the systems that matter."""
    rows = []
    for place, own in enumerate(found.final.headline("SoftCoT")):
        against = {
            "zero-shot": found.final.headline("zero-shot")[0],
            **{f"SoftCoT, {LABELS[each]}": replace(own, control=each) for each in ALL_CONTROLS},
            **{name: (found.final.headline(name) * 9)[place] for name in ("LoRA", "placeholders") if place == 0},
        }
        for name, other in against.items():
            pair = found.compared(own, other)
            if pair is not None:
                cells = [f"{pair.difference:+.1f}", pair.gained, pair.lost, f"{pair.p:.3f}"]
                rows.append([found.sizes.seeds[place], name, *cells])
    if not rows:
        return None
    head = ["seed", "SoftCoT against", "difference, points", "SoftCoT alone right", "other alone right", "p"]
    text = f"""McNemar's exact test on the same questions; p is two-sided and not corrected for the number of tests.

{table(head, rows)}"""
    return Section("Paired tests", text)


def style(found: Found) -> Section | None:
    """Own and human rationales to the same questions."""
    kinds = {"own": "own rationales", "human_same": "human rationales to the same questions"}
    rows = complete(
        [name, *(found.share(found.final.style(name, kind)) for kind in kinds)]
        + [found.tokens(found.final.style(name, kind)) or None for kind in kinds]
        for name in TRAINED
    )
    for control in CONTROLS:
        jobs = [replace(found.final.style("SoftCoT", kind), control=control) for kind in kinds]
        cells = [*map(found.share, jobs), *(found.tokens(job) or None for job in jobs)]
        rows += complete([[f"SoftCoT, {LABELS[control]}", *cells]])
    if not rows:
        return None
    text = f"""Trained on the base's own right answers, or on the data set's answers to the same questions.
Placeholders and virtual tokens cannot depend on the question, so what they gain is style.

{table(["system", *kinds.values(), *(f"tokens, {each}" for each in kinds.values())], rows)}"""
    return Section("Own and human rationales", text)


def other_tasks(found: Found) -> Section | None:
    """Pair A on tasks that it was not trained on."""
    jobs: dict[str, Callable[[str], Evaluation]] = {}
    for name in ("zero-shot", "prompt tuning", "LoRA", "SoftCoT"):
        jobs[name] = lambda task, name=name: found.final.transfer(name, task)
    for control in CONTROLS:
        label = f"SoftCoT, {LABELS[control]}"
        jobs[label] = lambda task, control=control: replace(found.final.transfer("SoftCoT", task), control=control)
    rows = complete([name, *(found.share(make(task)) for task in TRANSFERS)] for name, make in jobs.items())
    if not rows:
        return None
    text = f"""Systems trained on GSM8K and left enabled, on {found.sizes.transferred} questions of each of the other
tasks. What lies below zero-shot is forgotten.

{table(["pair A", *TRANSFERS], rows)}"""
    return Section("Other tasks, and forgetting", text)


def other_pairs(found: Found) -> Section | None:
    """The other pairs on GSM8K."""
    pairs = found.final.pairs[1:]
    systems = ("zero-shot", "LoRA", "SoftCoT")
    rows = complete([name, *(found.share(found.final.other(pair, name)) for pair in pairs)] for name in systems)
    for control in CONTROLS:
        jobs = [replace(found.final.other(pair, "SoftCoT"), control=control) for pair in pairs]
        rows += complete([[f"SoftCoT, {LABELS[control]}", *map(found.share, jobs)]])
    if not rows:
        return None
    text = f"""GSM8K; {found.sizes.compared} test questions, {found.sizes.headline} for pair D. D has A's base, so its
first two rows are A's.

{table(["system", *(f"pair {pair}" for pair in pairs)], rows)}"""
    return Section("Other pairs", text)


def grid(found: Found) -> Section | None:
    """N in training by N at inference."""
    numbers = found.sizes.numbers
    cells = [[found.share(found.final.cell(trained, number)) for number in numbers] for trained in numbers]
    if any(cell is None for row in cells for cell in row):
        return None
    rows = [[f"**{trained}**", *row] for trained, row in zip(numbers, cells, strict=True)]
    text = f"""{table(["training N (rows), inference N (columns)", *numbers], rows)}
{found.sizes.gridded} test questions per cell, the same ones in all."""
    means = [[100 * cell.mean for cell in row if cell] for row in cells]
    drawn = heat(means, numbers, numbers, "N in training", "N in inference")
    return Section("Number of thoughts", text, {"real_numbers": (drawn, (5.5, 3.6), "Accuracy by N")})


def self_consistency(found: Found) -> Section | None:
    """Votes over sampled answers."""
    counts = sorted({1, found.sizes.samples})
    rows = []
    for name in ("zero-shot", "SoftCoT"):
        result = found.result(found.final.vote(name))
        if result:
            voted = [share([votes(result["finals"], result["wanted"], count)]) for count in counts]
            rows.append([name, *voted])
    if not rows:
        return None
    text = f"""Sampled at temperature 0.7, {found.sizes.voted} test questions; majority of the first k answers:

{table(["pair A", *(f"k = {count}" for count in counts)], rows)}"""
    return Section("Self-consistency", text)


def probes(found: Found) -> Section | None:
    """What a linear probe finds in the assistants' states."""
    rows: list[list[object]] = []
    for job in found.final.probes():
        result = found.result(job)
        if result:
            hit, most = share([result["right"]]), share([result["most_frequent"]])
            rows.append([f"pair {job.pair}", job.task, len(result["right"]), result["classes"], hit, most])
    if not rows:
        return None
    head = ["assistant of", "task", "questions", "classes", "probe right, %", "most frequent answer right, %"]
    text = f"""Ridge regression from the assistant's states at the thought positions to the answer, in five folds:

{table(head, rows)}"""
    return Section("What the assistant knows", text)


def thoughts(found: Found) -> Section | None:
    """Norms, similarity and attention, and answers with the adapter disabled."""
    rows: list[list[object]] = []
    for job in found.final.diagnoses():
        result = found.result(job)
        if result:
            matrix, asked = result["similarity"], len(result["same_when_disabled"])
            others = [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j]
            paid = result["attention"]
            rows.append(
                [
                    job.training.pair,
                    f"{result['norms']['ratio']:.1f}",
                    f"{sum(others) / max(1, len(others)):.3f}",
                    f"{result['between_positions']:.3f}",
                    f"{100 * sum(paid) / len(paid):.1f}",
                    f"{sum(result['same_when_disabled'])} of {asked}",
                ]
            )
    if not rows:
        return None
    head = [
        "pair",
        "norm, relative to token embeddings",
        "cosine across questions",
        "cosine across positions",
        "attention to the thoughts, %",
        "answers as the base's with the adapter disabled",
    ]
    text = f"""A cosine across questions near 1 means that all questions have the same thoughts.

{table(head, rows)}"""
    return Section("The thoughts themselves", text)


def spreads(found: Found) -> Section | None:
    """How far states differ between questions before they are projected."""
    rows = []
    for job in plan.spreads(found.sizes):
        result = found.result(job)
        if result:
            base, assistant = PAIRS[job.pair]
            reader = f"{assistant} (assistant)" if job.thought_source == "assistant" else f"{base} (the base itself)"
            cells = [f"{result['norm']:.1f}", f"{result['cosine']:.4f}", f"{100 * result['share']:.2f}"]
            rows.append([reader, *cells])
    if not rows:
        return None
    head = ["source", "norm", "cosine between two questions", "share that depends on the question, %"]
    text = f"""The source's states at the thought positions, before any projection, for {found.sizes.diagnosed}
validation questions. The last column is the share of the squared norm that is left when each position's mean over the
questions is subtracted.

{table(head, rows)}"""
    return Section("What is projected", text)


def carried(found: Found) -> Section | None:
    """Training in the ways that could carry more of the question, also with a base that does not read it."""
    rows: list[list[object]] = []
    for (pair, name, reads), trainings in plan.carried(found.sizes).items():
        results = [(found.result(job), job.learning_rate) for job in trainings]
        done = [(result["losses"], rate) for result, rate in results if result]
        if len(done) == len(trainings):
            losses, rate = min(done, key=lambda each: each[0]["own"])
            gaps = [f"{losses[each] - losses['own']:+.3f}" for each in ("other_question", "mean", "zero")]
            rows.append([pair, "yes" if reads else "no", name, f"{rate:g}", f"{losses['own']:.3f}", *gaps])
    if not rows:
        return None
    rates = " and ".join(f"{rate:g}" for rate in plan.CARRIED_RATES)
    head = ["pair", "base reads the question", "what is changed", "rate", "loss"]
    head += ["with another question's, more", "with average thoughts, more", "with zero vectors, more"]
    text = f"""SoftCoT on the data set's own rationales, {found.sizes.carried_steps} steps of {found.sizes.batch} rows,
each row once. Losses are in nats per token of {found.sizes.validated} validation rows; of the rates {rates}, the one
with the lower loss. Where the base does not read the question, its prompt has a number in its place, and all that it
can know of the question comes from the thoughts: what another question's cost more is what they carry. *States of the
question's tokens* are not those of the thought positions, but the assistant's mean states over N stretches of the
question.

{table(head, rows)}"""
    return Section("How much thoughts can carry", text)


def tries(found: Found) -> Section | None:
    """Every try on the validation part, and the search for learning rates."""
    tried, rates = try_rows(found.store, found.sizes), rate_rows(found.store, found.sizes)
    if not rates:
        return None
    text = f"""On the validation part of the training file, {found.sizes.tried} questions, pair A, one thing changed
at a time. Losses are in nats per token of the validation rows. Rows in italics have no thoughts.

{table(TRY_HEAD, tried) if tried else ""}
Learning rates, by the loss per token after {found.sizes.pilot_steps} steps:

{table(RATE_HEAD, rates)}"""
    return Section("Every try", text)


SECTIONS = (
    in_short,
    headline,
    paired_tests,
    style,
    other_pairs,
    other_tasks,
    grid,
    self_consistency,
    thoughts,
    probes,
    spreads,
    carried,
    tries,
)
