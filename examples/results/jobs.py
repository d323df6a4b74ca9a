"""Definitions of the experiments. Independent of how they are run or reported.

Every run trains one system on one kind of problem of the small pair and evaluates it. All systems have the same base,
the same training problems in the same order, and the same number of steps. The learning rate of each system is
selected by its score on problems that no other run uses. Every seed has its own training problems, initial weights and
held-out problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .variants import CHAINS, ON_STRANGERS, PARTS, TUNED

TUNING_SEED = 100  # no other run uses its problems
# Peak learning rates to search, by system; wide enough that the best one is neither the first nor the last.
RATES = {
    "prompt tuning": (3e-2, 1e-1, 3e-1),
    "trained placeholders": (3e-3, 1e-2, 3e-2, 1e-1),
    "LoRA": (1e-3, 3e-3, 1e-2, 3e-2),
    "Coconut": (3e-4, 1e-3, 3e-3),
    "SoftCoT": (3e-3, 1e-2, 3e-2, 1e-1),  # and of its variants
}
UNTRAINED = ("zero-shot", "CoT-Unk", "Assist-CoT")
NUMBERS = (1, 2, 4, 8, 16, 32)  # of thoughts
WIDTHS = (16, 64, 128)  # of the assistant; the one in the repository has 64
PLACES = ("user_turn", "prompt_end")
ASKED_BY_SAMPLING = ("zero-shot", "Assist-CoT", "LoRA", "Coconut", "SoftCoT")


@dataclass(frozen=True)
class Making:
    """A model that must be trained first: an assistant of another width, or a base trained without hints."""

    what: str  # "base" or "assistant"
    width: int = 64  # of an assistant

    @property
    def name(self) -> str:
        """Name of the result and of the folder."""
        return "base-without-hints" if self.what == "base" else f"assistant-{self.width}"


@dataclass(frozen=True)
class Run:
    """One system, trained and evaluated on one kind of problem.

    Args:
        system: A key of `RATES`, or one of `UNTRAINED`.
        kind: Kind of the problems, one of `small_pair.KINDS`.
        seed: Seed of problems, initial weights and order.
        learning_rate: Peak rate; it decays linearly to zero.
        thoughts: N in training: thoughts, placeholders, virtual tokens or latent steps.
        width: Width of the assistant.
        hinted: Whether the base was trained to use hints.
        place: `"user_turn"` or `"prompt_end"` of a chat, or `""` for the end of the question, without a chat.
        asks: Evaluations in addition to held-out problems of the same kind: any of `"digits"`, `"samples"`,
            `"controls"`, `"numbers"`, `"diagnostics"`, `"characters"`, `"attention"`, `"chains"`.
        variant: A key of `VARIANTS`, or `""` for SoftCoT as in the paper.
    """

    system: str
    kind: str = "words"
    seed: int = 0
    learning_rate: float = 0.0
    thoughts: int = 8
    width: int = 64
    hinted: bool = True
    place: str = ""
    asks: tuple[str, ...] = ("digits",)
    variant: str = ""

    @property
    def label(self) -> str:
        """Name of what is trained, a key of the selected learning rates."""
        return f"{self.system}, {self.variant}" if self.variant else self.system

    @property
    def name(self) -> str:
        """Name of the result."""
        parts = [self.system.replace(" ", "-"), self.kind, f"seed{self.seed}", f"rate{self.learning_rate:g}"]
        parts += [f"N{self.thoughts}", f"width{self.width}", *(["unhinted"] if not self.hinted else []), self.place]
        parts += [self.variant.replace(",", "").replace(" = ", "").replace(" ", "-")]
        return "_".join(part for part in parts if part)


Job = Making | Run


def makings() -> list[Making]:
    """Return the models that are not in the repository."""
    return [Making("base"), *(Making("assistant", width) for width in WIDTHS if width != 64)]


def tuning() -> list[Run]:
    """Return a run for every trained system, and variant with a rate of its own, and each of its learning rates."""
    tried = [(system, "") for system in RATES] + [("SoftCoT", variant) for variant in TUNED]
    return [
        Run(system, seed=TUNING_SEED, learning_rate=rate, asks=(), variant=variant)
        for system, variant in tried
        for rate in RATES[system]
    ]


def experiments(rates: Mapping[str, float], seeds: Sequence[int]) -> list[Run]:
    """Return all reported runs, given the learning rate of each trained system."""
    runs = []
    for seed in seeds:
        for system in (*UNTRAINED, *RATES):
            for kind in ("words", "names", "strangers"):
                asks = ["digits"] if system in RATES or kind == "words" else []
                if kind == "words" and system in ASKED_BY_SAMPLING:
                    asks += ["samples"]
                if system == "SoftCoT":
                    asks += ["controls", "diagnostics"] + (["numbers"] if kind == "words" else [])
                    asks += ["chains"] if kind != "names" else []
                runs.append(Run(system, kind, seed, rates.get(system, 0.0), asks=tuple(asks)))
        for variant in (*PARTS, *CHAINS):
            for kind in ("words", "strangers") if variant in ON_STRANGERS else ("words",):
                asks = ["chains"] if variant in CHAINS else ["digits"] if kind == "words" else []
                run = Run("SoftCoT", kind, seed, asks=tuple(asks), variant=variant)
                runs.append(replace(run, learning_rate=rates.get(run.label, rates["SoftCoT"])))
        rate = rates["SoftCoT"]
        for number in NUMBERS:
            if number != 8:
                runs.append(Run("SoftCoT", "words", seed, rate, thoughts=number, asks=("numbers",)))
        for place in PLACES:
            asks = ("digits", "characters", *(["attention"] if place == "user_turn" else []))
            runs.append(Run("SoftCoT", "words", seed, rate, place=place, asks=asks))
        for width in WIDTHS:
            for system in ("Assist-CoT", "SoftCoT") if width != 64 else ():
                for kind in ("words", "names"):
                    runs.append(Run(system, kind, seed, rates.get(system, 0.0), width=width, asks=()))
        for system in ("zero-shot", "Assist-CoT", "prompt tuning", "LoRA", "SoftCoT"):
            runs.append(Run(system, "words", seed, rates.get(system, 0.0), hinted=False))
    return runs
