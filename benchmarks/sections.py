"""The measurements. Each returns plain data with all times, so that the page can be regenerated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from . import answering, beyond, pretrained, rivals, starting
from .memory import peak
from .models import Batch, Pair, as_loaded, attach, make_batch, make_pair, projection_of
from .rows import rows
from .sizes import Case, Size
from .timing import interleave, multiplications, own

FORMAT = 3  # of the results; results in another format are measured again
GROWING = (rivals.SOFTCOT, rivals.PLAIN, rivals.FLOOR, rivals.BASE)
BATCHED, SINGLE, WAITING = "in batches", "one at a time", "in batches, all rows to the end"
EQUAL, UNEQUAL = "answers of one length", "answers as long as GSM8K's"
BARE, DISABLED, BASE_AGAIN = "base + assistant", "disabled", "base again"


@dataclass
class Bench:
    """One run.

    Args:
        size: Models and batches.
        device: Device of the models.
        repeats: Rounds per measurement.
        models: Folder of pretrained models; `None`: the Hub.
        data_dir: Folder of the data that pretrained models read; `None`: the Hub.
    """

    size: Size
    device: str
    repeats: int
    models: Path | None = None
    data_dir: str | None = None

    @cached_property
    def pair(self) -> Pair:
        """The models, created or loaded on first use."""
        return make_pair(self.size, self.device, self.models)

    @cached_property
    def rows(self) -> list[pretrained.Row]:
        """Rows of a data set, for pretrained models."""
        args = pretrained.script_args(self.size, self.models, self.data_dir)
        return pretrained.load_rows(self.pair.reading.tokenizer, args)

    def questions(self, number: int) -> list[tuple[torch.Tensor, int]]:
        """Return prompts and the lengths of their answers: those of rows, or random ones with the lengths of GSM8K."""
        longest = self.size.longest_answer
        if self.size.pretrained:
            return [(prompt, min(longest, len(response))) for prompt, response in self.rows[:number]]
        return answering.make_questions(number, longest, self.size.vocabulary)

    def parameters(self) -> dict[str, int]:
        """Return the number of parameters of each model."""
        return {"base": self.pair.base.num_parameters(), "assistant": self.pair.assistant.num_parameters()}

    def batch(self, case: Case) -> Batch:
        """Create a training batch."""
        return make_batch(case, self.size.vocabulary, self.pair.device)

    def time(self, actions: dict[str, Callable[[], Any]], what: str, **options: Any) -> dict[str, list[float]]:
        """Measure times, with all methods in every round."""
        return interleave(actions, options.pop("repeats", self.repeats), what, **options)


def training(bench: Bench) -> list[dict[str, Any]]:
    """Measure time, memory and multiplications of every method's step for each case, and the parts of the floor.

    Methods that differ by a few percent are timed again without the others, in more rounds.
    """
    found = []
    for case in bench.size.cases:
        batch = bench.batch(case)
        steps = rivals.steps(bench.pair, batch)
        times = bench.time(steps, str(case), repeats=(bench.repeats + 1) // 2)
        near = {name: step for name, step in steps.items() if name in rivals.NEAR}
        projection = projection_of(attach(bench.pair, case.thoughts))
        parts = [rivals.floor_parts(bench.pair, projection, batch) for _ in range(1 + bench.repeats)][1:]
        found.append(
            {
                "case": asdict(case),
                "text": str(case),
                "seconds": times,
                # without the others, whose large tensors slow down the next step
                "near_seconds": bench.time(near, f"{case}, near ones", repeats=2 * bench.repeats),
                "peak_bytes": {name: peak(step, bench.pair.device) for name, step in steps.items()},
                "multiplications": {name: multiplications(step) for name, step in steps.items()},
                "parts": {name: [part[name] for part in parts] for name in parts[0]},
            }
        )
    return found


def growth(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """Measure seconds and peak bytes of a step by number of thoughts, prompt length and batch size."""
    found: dict[str, list[dict[str, Any]]] = {}
    for field, values in bench.size.grow.items():
        found[field] = []
        for value in values:
            case = replace(bench.size.case, **{field: value})
            steps = rivals.steps(bench.pair, bench.batch(case), GROWING)
            times = bench.time(steps, f"{field} {value}", repeats=(bench.repeats + 1) // 2)
            memory = {name: peak(step, bench.pair.device) for name, step in steps.items()}
            found[field].append({"at": value, "seconds": times, "peak_bytes": memory})
    return found


def evaluation(bench: Bench) -> dict[str, Any]:
    """Measure the seconds to answer all questions in batches and one at a time, and peak bytes of the longest batch.

    Answers have either the lengths of GSM8K's, or equal lengths with the same total. Pretrained models take minutes
    for each way to answer, and have the most important ones only.
    """
    size, device, num, eos = bench.size, bench.pair.device, bench.size.case.thoughts, bench.pair.eos
    questions = bench.questions(size.questions)
    models = {rivals.SOFTCOT: attach(bench.pair, num), rivals.BASE: as_loaded(bench.pair.base)}
    if not size.pretrained:
        models |= {rivals.PROMPT_TUNING: rivals.prompt_tuning(bench.pair, num), rivals.LORA: rivals.lora(bench.pair)}
    asks = {name: answering.called(model) for name, model in models.items()}
    models[BARE] = as_loaded(bench.pair.base)
    asks[BARE] = answering.bare(bench.pair, models[BARE], num)
    tokens = sum(length for _, length in questions)
    each = round(tokens / len(questions))
    asked = {UNEQUAL: questions, EQUAL: [(ids, each) for ids, _ in questions]}

    def action(name: str, how: str, lengths: str) -> Callable[[], Any]:
        rows, live = 1 if how == SINGLE else size.questions_at_once, models[name] if how == BATCHED else None
        return partial(answering.evaluate, asks[name], asked[lengths], rows, device, live, eos)

    wanted = [(name, BATCHED, UNEQUAL) for name in asks]
    if not size.pretrained:
        wanted += [(rivals.SOFTCOT, how, EQUAL) for how in (BATCHED, SINGLE)]
        wanted += [(rivals.SOFTCOT, how, UNEQUAL) for how in (WAITING, SINGLE)]
    actions = {", ".join(parts): action(*parts) for parts in wanted}
    longest = sorted(questions, key=lambda question: len(question[0]))[-size.questions_at_once :]
    for ask in asks.values():  # warm-up; a whole round would take too long
        answering.answer(ask, [(ids, 2) for ids, _ in longest] if size.pretrained else longest, device, eos)
    return {
        "questions": size.questions,
        "longest": size.longest_answer,
        "each": each,
        "tokens": tokens,
        "at_once": size.questions_at_once,
        "busy": answering.busy(questions, size.questions_at_once),
        "seconds": bench.time(actions, "evaluation", repeats=max(2, bench.repeats // 3), warmup=0),
        "peak_bytes": {
            name: peak(partial(answering.answer, ask, longest, device, eos), device) for name, ask in asks.items()
        },
    }


def generation(bench: Bench) -> dict[str, Any]:
    """Measure `generate` and its single steps with the adapter, with the adapter disabled, and without it."""
    size, device, num = bench.size, bench.pair.device, bench.size.case.thoughts
    questions = answering.make_questions(size.questions_at_once, size.longest_answer, size.vocabulary)
    model = answering.disabled(bench.pair, num)
    asks = {
        rivals.SOFTCOT: answering.called(attach(bench.pair, num)),
        BARE: answering.bare(bench.pair, as_loaded(bench.pair.base), num),
        DISABLED: answering.called(model),
        rivals.BASE: answering.called(as_loaded(bench.pair.base)),
        BASE_AGAIN: answering.called(as_loaded(bench.pair.base)),
    }
    batch = bench.batch(size.case)
    inputs = {name: batch.rows[name] for name in ("input_ids", "attention_mask")}

    def forward(module: torch.nn.Module) -> Callable[[], Any]:
        return torch.no_grad()(lambda: module(**inputs, logits_to_keep=1, use_cache=False))

    def each(function: Callable[..., Any], rows: int, *options: int) -> dict[str, Callable[[], Any]]:
        return {name: partial(function, ask, questions[:rows], *options, device) for name, ask in asks.items()}

    def step(rows: int, what: str) -> dict[str, list[float]]:
        # short answers and more rounds, because the load of the machine changes from second to second
        tokens, repeats = size.longest_answer // 4 + 1, 2 * bench.repeats
        return bench.time(each(answering.step_seconds, rows, tokens), what, clock=own, repeats=repeats)

    return {
        "rows": len(questions),
        "tokens": max(length for _, length in questions),
        "generate": bench.time(each(answering.answer, len(questions)), "generate"),
        "step": step(len(questions), "decoding"),
        "step of one row": step(1, "decoding one row"),
        "forward": bench.time(
            {
                DISABLED: forward(model),
                rivals.BASE: forward(as_loaded(bench.pair.base)),
                BASE_AGAIN: forward(as_loaded(bench.pair.base)),
            },
            "disabled forward",
        ),
    }


def extensions(bench: Bench) -> dict[str, Any]:
    """Measure time and memory of a base as its own source and of several chains, in training and generation."""
    batch, device = bench.batch(bench.size.case), bench.pair.device
    tried = {
        "training": beyond.steps(bench.pair, batch),
        "prefill": beyond.answers(bench.pair, batch, 1),
        "generate": beyond.answers(bench.pair, batch, bench.size.longest_answer),
    }
    repeats = {"training": 2, "prefill": 3, "generate": 1}  # short ones run in more rounds
    return {
        "text": str(bench.size.case),
        "tokens": bench.size.longest_answer,
        "seconds": {
            what: bench.time(actions, what, repeats=repeats[what] * bench.repeats) for what, actions in tried.items()
        },
        "peak_bytes": {
            # not of whole answers: counting every tensor of every token takes minutes
            what: {name: peak(action, device) for name, action in tried[what].items()}
            for what in ("training", "prefill")
        },
    }


def start(bench: Bench) -> dict[str, Any]:
    """Measure the import, find its slowest modules, and record the files read while loading."""
    return {
        "seconds": starting.import_seconds(bench.size.processes),
        "slowest": starting.slowest_imports(),
        "files": starting.files_read(),
    }


SECTIONS: dict[str, Callable[[Bench], Any]] = {
    "start": start,
    "generation": generation,
    "training": training,
    "rows": rows,
    "evaluation": evaluation,
    "growth": growth,
    "extensions": extensions,
}


def sections_of(size: Size) -> list[str]:
    """Return the names of the sections that a size can measure."""
    return [name for name in SECTIONS if (name in ("rows", "evaluation") if size.pretrained else name != "rows")]
