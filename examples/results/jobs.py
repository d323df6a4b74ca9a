"""Which experiments there are. It knows nothing of how they are run or told.

Every run trains one system on one kind of problems of the small pair and asks it. All systems have the same base, the
same training problems in the same order, the same number of steps, and a learning rate of their own, chosen by its
score on problems that no other run is asked. Every seed has training problems, initial weights and held-out problems
of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TUNING_SEED = 100  # its problems are asked in no other run
# Peak learning rates that are tried, by system; wide enough that the best one is neither the first nor the last.
RATES = {
    "prompt tuning": (3e-2, 1e-1, 3e-1),
    "trained placeholders": (3e-3, 1e-2, 3e-2, 1e-1),
    "LoRA": (1e-3, 3e-3, 1e-2, 3e-2),
    "Coconut": (3e-4, 1e-3, 3e-3),
    "SoftCoT": (1e-2, 3e-2, 1e-1),
}
UNTRAINED = ("zero-shot", "CoT-Unk", "Assist-CoT")
NUMBERS = (1, 2, 4, 8, 16, 32)  # of thoughts
WIDTHS = (16, 64, 128)  # of the assistant; 64 is the one that comes with the repository
PLACES = ("user_turn", "prompt_end")
ASKED_BY_SAMPLING = ("zero-shot", "Assist-CoT", "LoRA", "Coconut", "SoftCoT")


@dataclass(frozen=True)
class Making:
    """A model that has to be trained first: an assistant of another width, or a base that never saw a hint."""

    what: str  # "base" or "assistant"
    width: int = 64  # of an assistant

    @property
    def name(self) -> str:
        """Name of its result and of its folder."""
        return "base-without-hints" if self.what == "base" else f"assistant-{self.width}"


@dataclass(frozen=True)
class Run:
    """One system, trained on one kind of problems, and asked.

    Args:
        system: A key of `RATES`, or one of `UNTRAINED`.
        kind: Of the problems: one of `small_pair.KINDS`.
        seed: Of problems, initial weights and order.
        learning_rate: Peak rate; it falls linearly to zero.
        thoughts: N in training: thoughts, placeholders, virtual tokens, latent steps.
        width: Of the assistant.
        hinted: Whether the base has learned to use hints.
        place: `"user_turn"` or `"prompt_end"` of a chat, or `""`: behind the question, no chat.
        asks: What is asked beside problems of its own kind: some of `"digits"`, `"samples"`, `"controls"`,
            `"numbers"`, `"diagnostics"`, `"characters"`, `"attention"`.
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

    @property
    def name(self) -> str:
        """Name of its result."""
        parts = [self.system.replace(" ", "-"), self.kind, f"seed{self.seed}", f"rate{self.learning_rate:g}"]
        parts += [f"N{self.thoughts}", f"width{self.width}", *(["unhinted"] if not self.hinted else []), self.place]
        return "_".join(part for part in parts if part)


Job = Making | Run


def makings() -> list[Making]:
    """Models that do not come with the repository."""
    return [Making("base"), *(Making("assistant", width) for width in WIDTHS if width != 64)]


def tuning() -> list[Run]:
    """Every trained system with each of its rates."""
    return [
        Run(system, seed=TUNING_SEED, learning_rate=rate, asks=()) for system, rates in RATES.items() for rate in rates
    ]


def experiments(rates: Mapping[str, float], seeds: Sequence[int]) -> list[Run]:
    """All runs that are reported, given the learning rate of each trained system."""
    runs = []
    for seed in seeds:
        for system in (*UNTRAINED, *RATES):
            for kind in ("words", "names", "strangers"):
                asks = ["digits"] if system in RATES or kind == "words" else []
                if kind == "words" and system in ASKED_BY_SAMPLING:
                    asks += ["samples"]
                if system == "SoftCoT":
                    asks += ["controls", "diagnostics"] + (["numbers"] if kind == "words" else [])
                runs.append(Run(system, kind, seed, rates.get(system, 0.0), asks=tuple(asks)))
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
