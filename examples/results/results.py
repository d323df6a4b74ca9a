"""The results of all runs, looked up by the fields of the run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from statistics import median
from typing import Any

from .jobs import experiments
from .statistics import Share, share, votes
from .store import Store
from .work import Sizes

PLAIN = {"kind": "words", "thoughts": 8, "width": 64, "hinted": True, "place": "", "variant": ""}  # defaults of a run


class Results:
    """Results of the runs, over seeds.

    Args:
        store: Results of all `experiments(rates, sizes.seeds)`.
        rates: Learning rate of each trained system.
        sizes: Size of the experiments.
    """

    def __init__(self, store: Store, rates: Mapping[str, float], sizes: Sizes) -> None:
        self.store = store
        self.rates = rates
        self.sizes = sizes
        self.runs = experiments(rates, sizes.seeds)

    def found(self, *path: str, **wanted: Any) -> list[Any]:
        """Return the values at a path of keys in the results of the matching runs, in the order of seeds.

        Args:
            *path: Keys, such as `"controls", "zero"`.
            **wanted: Fields of `Run`; missing fields have their defaults.

        Raises:
            KeyError: No run has these fields.
        """
        values = PLAIN | wanted
        runs = [run for run in self.runs if all(getattr(run, name) == value for name, value in values.items())]
        if not runs:
            raise KeyError(f"No run has {values}.")
        return [reduce(lambda value, key: value[key], path, self.store[run]) for run in runs]

    def share(self, *path: str, **wanted: Any) -> Share:
        """Return the share of correct answers; without a path, on problems of the run's own kind."""
        return share(self.found(*(path or ("right",)), **wanted))

    def vote(self, samples: int, *path: str, **wanted: Any) -> Share:
        """Return the share of problems whose most frequent result among the first `samples` is correct.

        Args:
            samples: How many of the results vote.
            *path: Keys of what holds `"finals"` and `"wanted"`; by default `"samples"`.
            **wanted: As in `found`.
        """
        drawn = self.found(*(path or ("samples",)), **wanted)
        return share([votes(each["finals"], each["wanted"], samples) for each in drawn])

    def median(self, *path: str, **wanted: Any) -> float:
        """Return the median of a value over seeds."""
        return median(self.found(*path, **wanted))
