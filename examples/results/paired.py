"""Paired comparisons of two systems on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest


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
