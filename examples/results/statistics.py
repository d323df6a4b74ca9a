"""Pure functions that compute percentages with intervals from answers, and majority votes from samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import binomtest, t

from softcot_peft.analysis import majority_vote

Runs = Sequence[Sequence[int]]  # per seed, 1 for a correct answer and 0 for a wrong one


@dataclass(frozen=True)
class Share:
    """A share of correct answers with its 95 % interval, all between 0 and 1."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def half_interval(values: Sequence[float]) -> float:
    """Return half the width of Student's 95 % interval of a mean."""
    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def share(runs: Runs, same_questions: bool = False) -> Share:
    """Return the mean over seeds with the wider of two 95 % intervals.

    Student's t interval over the seeds' shares reflects how much runs differ (with three seeds it is 2.5 times the
    standard deviation). Wilson's interval over all answers (Wilson 1927) reflects the number of answers, also if all
    are correct or all are wrong. Student's is clipped to [0, 1].

    Args:
        runs: The answers of each seed.
        same_questions: Whether all seeds have the same questions, so that more seeds are not more questions.

    Raises:
        ValueError: If a seed has no answers.
    """
    if not runs or not all(runs):
        raise ValueError(f"`runs` must hold answers for each seed, got {[len(run) for run in runs]} answers.")
    shares = [mean(run) for run in runs]
    middle, questions = mean(shares), len(runs[0]) if same_questions else sum(map(len, runs))
    wilson = binomtest(round(middle * questions), questions).proportion_ci(0.95, method="wilson")
    half = half_interval(shares) if len(shares) > 1 else 0.0
    low, high = min(float(wilson.low), middle - half), max(float(wilson.high), middle + half)
    return Share(middle, max(low, 0.0), min(high, 1.0))


def votes(finals: Sequence[Sequence[str]], wanted: Sequence[str], samples: int) -> list[int]:
    """Self-consistency (Wang et al. 2022, arXiv 2203.11171): 1 if the most frequent of the first results is correct.

    The first of several equally frequent results wins; empty results do not vote.

    Args:
        finals: Results of the samples of each problem.
        wanted: Correct result of each problem.
        samples: Number of samples that vote.
    """
    return [int(majority_vote(drawn[:samples]) == want) for drawn, want in zip(finals, wanted, strict=True)]
