"""Definitions of the study's jobs. Independent of how they are run or reported.

Every job is described by its fields alone, so a result is found again by them. Models are named by size, as the roles
of a pair; `../real.py` says which models these are.
"""

from __future__ import annotations

from dataclasses import dataclass

# Base and assistant of each pair. In D the base is its own assistant.
PAIRS = {
    "A": ("medium", "small"),
    "B": ("large", "medium"),
    "C": ("small", "medium"),
    "D": ("medium", "medium"),
}
UNTRAINED = ("zero-shot", "Assist-CoT", "CoT-Unk")
TRAINED = ("prompt tuning", "placeholders", "LoRA", "SoftCoT")
TRANSFERS = ("aqua", "strategyqa", "date_understanding", "commonsenseqa", "asdiv")
# `human`: of the data set. `own`: right answers that the base wrote itself. `human_same`: human ones to the questions
# of the own ones, so that the two differ in style alone.
RATIONALES = ("human", "own", "human_same")


def hyphened(*parts: object) -> str:
    """Return a name without spaces."""
    return "_".join(str(part).replace(" ", "-") for part in parts if str(part))


@dataclass(frozen=True)
class Writing:
    """A base answers training questions; those with the right answer become rationales of its own.

    Args:
        base: Size of the base.
        first: Place of the first question in the training part.
        count: Number of questions.
        seed: Of sampling, one sample per question.
    """

    base: str
    first: int
    count: int
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the result."""
        return hyphened("write", self.base, self.first)


@dataclass(frozen=True)
class Training:
    """One system, trained on GSM8K's training part. Steps, batch and order of rows are the same for all systems.

    Args:
        pair: A key of `PAIRS`.
        system: One of `TRAINED`.
        rationales: One of `RATIONALES`.
        learning_rate: Peak rate; it decays linearly to zero.
        steps: Optimizer steps.
        batch: Rows per step.
        warmup: Share of the steps in which the rate rises linearly.
        thoughts: N: thoughts, placeholders or virtual tokens.
        seed: Of initial weights and order of rows.
        validated: Rows of the validation part for the losses with and without thoughts.
        projection: Field of `SoftCoTConfig`, as the next three.
        projection_init: How the projection begins.
        thought_source: What reads the prompt: `"assistant"`, `"base"`, or `"question_stretches"` (stretches.py).
        chain_init: `"trained"` for an embedding at the assistant's thought positions that is trained.
        lead_in: Whether the assistant's own turn begins with a lead-in, as in the paper.
        depth: Share of the assistant's layers that run; below 1, its states are those of an earlier layer.
        contrast: Weight of a term that keeps the loss with another question's thoughts above that with one's own.
        standardized: Whether the source's states have mean 0 and variance 1 over questions before they are projected.
        blind: Whether the base does not read the question, which the assistant alone knows then.
    """

    pair: str = "A"
    system: str = "SoftCoT"
    rationales: str = "human"
    learning_rate: float = 1e-3
    steps: int = 40
    batch: int = 8
    warmup: float = 0.1
    thoughts: int = 8
    seed: int = 0
    validated: int = 32
    projection: str = "linear"
    projection_init: str = "default"
    thought_source: str = "assistant"
    chain_init: str | None = None
    lead_in: bool = True
    depth: float = 1.0
    contrast: float = 0.0
    standardized: bool = False
    blind: bool = False

    @property
    def name(self) -> str:
        """Name of the result and of the folder of its weights."""
        rate = f"rate{self.learning_rate:g}"
        return hyphened(
            "train", self.pair, self.system, self.rationales, rate, f"N{self.thoughts}", f"seed{self.seed}"
        )


@dataclass(frozen=True)
class Evaluation:
    """Answers of one system to questions of one task.

    Args:
        pair: A key of `PAIRS`.
        system: One of `UNTRAINED`, or the system of `training`.
        task: A task of `evaluation/`.
        split: `"validation"`, a part of the training file, or `"test"`.
        count: Number of questions; fewer if the split has fewer.
        control: What replaces the thoughts, a key of `softcot_peft.analysis.CONTROLS`.
        samples: Answers per question; 1 is greedy, more are sampled.
        inference_thoughts: N, or 0 for N in training.
        training: How the system was trained, or None.
    """

    pair: str
    system: str
    task: str = "gsm8k"
    split: str = "test"
    count: int = 64
    control: str = "own"
    samples: int = 1
    inference_thoughts: int = 0
    training: Training | None = None

    @property
    def name(self) -> str:
        """Name of the result."""
        number = f"N{self.inference_thoughts}" if self.inference_thoughts else ""
        votes = f"k{self.samples}" if self.samples > 1 else ""
        control = "" if self.control == "own" else self.control
        return hyphened("ask", self.pair, self.system, self.task, self.split, control, number, votes)


@dataclass(frozen=True)
class Diagnosis:
    """Norms, similarity and attention of a trained projection's thoughts, and answers with the adapter disabled."""

    training: Training
    count: int = 32

    @property
    def name(self) -> str:
        """Name of the result."""
        return hyphened("diagnose", self.training.pair, self.training.rationales, f"seed{self.training.seed}")


@dataclass(frozen=True)
class Probe:
    """A linear probe of the answer on the assistant's states at the thought positions, before any projection."""

    pair: str
    task: str
    count: int = 400
    thoughts: int = 8

    @property
    def name(self) -> str:
        """Name of the result."""
        return hyphened("probe", self.pair, self.task)


@dataclass(frozen=True)
class Spread:
    """How far the states that are projected differ between questions, before any training."""

    pair: str
    thought_source: str = "assistant"
    count: int = 64
    thoughts: int = 8

    @property
    def name(self) -> str:
        """Name of the result."""
        return hyphened("spread", self.pair, self.thought_source)


Job = Writing | Training | Evaluation | Diagnosis | Probe | Spread


def asked(training: Training, **fields: object) -> Evaluation:
    """Return an evaluation of a trained system."""
    return Evaluation(training.pair, training.system, training=training, **fields)  # type: ignore[arg-type]
