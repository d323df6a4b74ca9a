"""The jobs of the final part: the test files, with the settings of the protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .jobs import PAIRS, TRAINED, TRANSFERS, UNTRAINED, Diagnosis, Evaluation, Job, Probe, Training, asked
from .plan import ALL_CONTROLS, CONTROLS, Sizes

Choices = Mapping[str, Mapping[str, Any]]  # by system, fields of `Training`
PROBED = ("aqua", "strategyqa", "commonsenseqa")
OTHER_SYSTEMS = ("LoRA", "SoftCoT")  # trained for the other pairs


@dataclass(frozen=True)
class Final:
    """The final part, section by section. `all` lists every job once, in an order in which each finds earlier ones.

    Args:
        choices: Settings of each trained system, from the protocol.
        sizes: Size of the study.
        available: Sizes of the models at hand; pairs without their models are left out.
    """

    choices: Choices
    sizes: Sizes
    available: tuple[str, ...] = ("small", "medium", "large")

    @property
    def pairs(self) -> list[str]:
        """The pairs whose models are at hand."""
        return [name for name, sizes in PAIRS.items() if set(sizes) <= set(self.available)]

    def training(self, system: str, **changes: Any) -> Training:
        """Return the training of a system, as chosen but for some fields."""
        chosen = Training(system=system, **self.choices[system])
        changes.setdefault("steps", min(chosen.steps, self.sizes.steps))  # smaller studies train shorter
        pair = changes.get("pair")
        if pair and PAIRS[pair][0] not in dict(self.sizes.written):
            changes["rationales"] = "human"  # this base has written none of its own
        if pair == "B":
            changes["batch"] = max(2, chosen.batch // 2)  # its rows take three times as long
        return replace(chosen, **changes)

    def headline(self, system: str) -> list[Evaluation]:
        """Return the evaluations of a system for pair A on GSM8K, by seed."""
        if system in UNTRAINED:
            return [Evaluation("A", system, count=self.sizes.headline)]
        seeds = self.sizes.seeds if system in self.sizes.seeded else self.sizes.seeds[:1]
        return [asked(self.training(system, seed=seed), count=self.sizes.headline) for seed in seeds]

    def controls(self, control: str) -> list[Evaluation]:
        """Return the headline's SoftCoT with a control: real thoughts by seed, others for the first."""
        seeds = self.headline("SoftCoT")[: None if control in ("other_question", "mean") else 1]
        return [replace(each, control=control) for each in seeds]

    def style(self, system: str, rationales: str) -> Evaluation:
        """Return the evaluation of a system trained on own or human rationales to the same questions."""
        return asked(self.training(system, rationales=rationales), count=self.sizes.headline)

    def cell(self, trained: int, inference: int) -> Evaluation:
        """Return the evaluation of SoftCoT with one N in training and another at inference."""
        training = self.training("SoftCoT", thoughts=trained)
        return asked(training, count=self.sizes.gridded, inference_thoughts=inference)

    def transfer(self, system: str, task: str) -> Evaluation:
        """Return the evaluation of a system of pair A, trained on GSM8K, on another task."""
        count = self.sizes.transferred
        if system in UNTRAINED:
            return Evaluation("A", system, task, count=count)
        return asked(self.training(system), task=task, count=count)

    def vote(self, system: str) -> Evaluation:
        """Return the sampled answers of a system of pair A."""
        fields: dict[str, Any] = {"count": self.sizes.voted, "samples": self.sizes.samples}
        return Evaluation("A", system, **fields) if system in UNTRAINED else asked(self.training(system), **fields)

    def other(self, pair: str, system: str) -> Evaluation:
        """Return the evaluation of a system of another pair on GSM8K. D has A's base, so it shares all but SoftCoT."""
        if pair == "D" and system != "SoftCoT":
            return self.headline(system)[0]
        count = self.sizes.headline if pair == "D" else self.sizes.compared
        if system in UNTRAINED:
            return Evaluation(pair, system, count=count)
        return asked(self.training(system, pair=pair), count=count)

    def diagnoses(self) -> list[Diagnosis]:
        """Return the descriptions of the thoughts, by pair."""
        trainings = [self.training("SoftCoT", pair=pair) for pair in self.pairs]
        return [Diagnosis(training, self.sizes.diagnosed) for training in trainings]

    def probes(self) -> list[Probe]:
        """Return the probes of the assistants of pairs A and D."""
        return [Probe(pair, task, self.sizes.probed) for pair in ("A", "D") for task in PROBED]

    def evaluations(self) -> Iterable[Evaluation]:
        """Yield all evaluations, the headline first."""
        for system in (*UNTRAINED, *TRAINED):
            yield from self.headline(system)
        for control in ALL_CONTROLS:
            yield from self.controls(control)
        for pair in self.pairs[1:]:
            yield from (self.other(pair, system) for system in ("zero-shot", *OTHER_SYSTEMS))
            yield from (replace(self.other(pair, "SoftCoT"), control=control) for control in CONTROLS)
        for rationales in ("own", "human_same"):
            yield from (self.style(system, rationales) for system in TRAINED)
            compared = self.style("SoftCoT", rationales)
            yield from (replace(compared, control=control) for control in CONTROLS)
        for task in TRANSFERS:
            yield from (self.transfer(system, task) for system in ("zero-shot", "prompt tuning", "LoRA", "SoftCoT"))
            yield from (replace(self.transfer("SoftCoT", task), control=control) for control in CONTROLS)
        yield from (self.vote(system) for system in ("zero-shot", "SoftCoT"))
        for trained in self.sizes.numbers:
            yield from (self.cell(trained, inference) for inference in self.sizes.numbers)

    def all(self) -> list[Job]:
        """Return every job once."""
        jobs: list[Job] = []
        for evaluation in self.evaluations():
            if evaluation.training is not None:
                jobs.append(evaluation.training)
            jobs.append(evaluation)
        return list(dict.fromkeys([*jobs, *self.diagnoses(), *self.probes()]))
