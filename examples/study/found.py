"""The finished results of the study, looked up by job; what is missing is None."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from results.paired import Difference, Paired, difference, paired
from results.statistics import Share, share
from results.store import Store

from .final import Final
from .jobs import Evaluation, Job
from .plan import Sizes


@dataclass(frozen=True)
class Found:
    """Finished results.

    Args:
        store: The store.
        final: Jobs of the final part, with the protocol's choices.
        sizes: Size of the study.
    """

    store: Store
    final: Final
    sizes: Sizes

    def result(self, job: Job) -> dict[str, Any] | None:
        """Return the result of a job; None if it is not finished."""
        return self.store[job] if job in self.store else None  # noqa: SIM401  # a store has no `get`

    def right(self, jobs: Evaluation | Sequence[Evaluation]) -> list[list[int]] | None:
        """Return which answers are right, by evaluation; None unless all are finished."""
        several = [jobs] if isinstance(jobs, Evaluation) else jobs
        found = [self.result(job) for job in several]
        return [each["right"] for each in found if each] if found and all(found) else None

    def share(self, jobs: Evaluation | Sequence[Evaluation]) -> Share | None:
        """Return the share of right answers, over evaluations with the same questions."""
        right = self.right(jobs)
        return None if right is None else share(right, same_questions=True)

    def tokens(self, jobs: Evaluation | Sequence[Evaluation]) -> str:
        """Return the mean number of tokens per answer."""
        several = [jobs] if isinstance(jobs, Evaluation) else jobs
        found = [self.result(job) for job in several]
        return f"{mean(each['tokens'] for each in found if each):.0f}" if found and all(found) else ""

    def compared(self, first: Evaluation, second: Evaluation) -> Paired | None:
        """Compare two evaluations on the same questions; None unless both are finished."""
        one, other = self.result(first), self.result(second)
        if one is None or other is None:
            return None
        asked = min(len(one["right"]), len(other["right"]))
        if one["ids"][:asked] != other["ids"][:asked]:
            raise ValueError(f"{first.name} and {second.name} must have the same questions, but they differ.")
        return paired(one["right"][:asked], other["right"][:asked])

    def asked(self, jobs: Evaluation | Sequence[Evaluation]) -> set[tuple[str, ...]]:
        """Return the different lists of questions of finished evaluations."""
        return {tuple(self.store[job]["ids"]) for job in ([jobs] if isinstance(jobs, Evaluation) else jobs)}

    def difference(
        self, first: Evaluation | Sequence[Evaluation], second: Evaluation | Sequence[Evaluation]
    ) -> Difference | None:
        """Return the first one's share of right answers minus the second one's; None unless both are finished."""
        one, other = self.right(first), self.right(second)
        if one is None or other is None:
            return None
        if len(self.asked(first) | self.asked(second)) > 1:
            raise ValueError("The evaluations that are compared must have the same questions, but they differ.")
        return difference(one, other)


def complete(rows: Iterable[Sequence[object]]) -> list[list[object]]:
    """Return the rows that have a figure, with empty cells where one is missing."""
    return [["" if cell is None else cell for cell in row] for row in rows if any(c is not None for c in row[1:])]
