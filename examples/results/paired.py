"""Paired comparisons of two systems on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from scipy.stats import binomtest

from .statistics import half_interval


@dataclass(frozen=True)
class Paired:
    """How often one of two systems alone is right.

    Args:
        gained: Questions that the first one alone answers correctly.
        lost: Questions that the second one alone answers correctly.
        asked: All questions.
    """

    gained: int
    lost: int
    asked: int

    @property
    def p(self) -> float:
        """McNemar's exact test (McNemar 1947): the two-sided binomial test of `gained` against `lost`."""
        return float(binomtest(self.gained, self.gained + self.lost).pvalue) if self.gained + self.lost else 1.0

    @property
    def difference(self) -> float:
        """First minus second, in points."""
        return 100 * (self.gained - self.lost) / self.asked


def paired(first: Sequence[int], second: Sequence[int]) -> Paired:
    """Compare which answers are right, 1 or 0, in the same order of questions.

    Raises:
        ValueError: The numbers of answers differ, or there are none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            f"`first` and `second` must hold answers to the same questions, got {len(first)} and {len(second)}."
        )
    pairs = list(zip(first, second, strict=True))
    return Paired(pairs.count((1, 0)), pairs.count((0, 1)), len(pairs))


@dataclass(frozen=True)
class Difference:
    """A difference between two systems in points, with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def difference(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> Difference:
    """Return the share of right answers of the first system minus that of the second, on the same questions.

    A question's difference is that of its means over the seeds of each system; Student's t interval is over questions.

    Args:
        first: Which answers are right, 1 or 0, by seed.
        second: Of the other system, which may have another number of seeds.

    Raises:
        ValueError: The numbers of answers differ, or there are fewer than two.
    """
    asked = {len(run) for run in (*first, *second)}
    if len(asked) != 1 or min(asked) < 2:
        raise ValueError(f"`first` and `second` must hold answers to the same questions, two or more, got {asked}.")
    one, other = ([mean(answers) for answers in zip(*runs, strict=True)] for runs in (first, second))
    found = [100 * (a - b) for a, b in zip(one, other, strict=True)]
    middle, half = mean(found), half_interval(found)
    return Difference(middle, middle - half, middle + half)
