"""Times rivals in rounds, so that what else the machine does falls on all of them alike; counts multiplications."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median, quantiles
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import timer
from torch.utils.flop_counter import flop_registry
from tqdm import trange

Times = dict[str, list[float]]
Clock = Callable[[Callable[[], Any]], float]


def seconds(action: Callable[[], Any]) -> float:
    """Seconds that an action takes, until the accelerator has done its work too."""
    before = timer()
    action()
    return timer() - before


def own(action: Callable[[], float]) -> float:
    """What an action has timed itself."""
    return action()


def interleave(
    actions: Mapping[str, Callable[[], Any]], repeats: int, what: str, clock: Clock = seconds, warmup: int = 1
) -> Times:
    """Time actions in rounds, each in an order of chance, so that none always follows the same one.

    Not with `torch.utils.benchmark.Timer`: it times one statement after the other, and warms up before each.

    Args:
        actions: What is timed, by name.
        repeats: Rounds.
        what: Shown beside the progress bar.
        clock: Gives the seconds of an action.
        warmup: Rounds before, which are not counted.
    """
    times: Times = {name: [] for name in actions}
    chance = Random(0)
    gc.collect()
    for _ in trange(-warmup, repeats, desc=what, leave=False, unit="round"):
        gc.disable()  # as timeit does: collections fall on whoever runs when they are due
        try:
            for name in chance.sample(list(actions), len(actions)):
                times[name].append(clock(actions[name]))
        finally:
            gc.enable()
    return {name: found[warmup:] for name, found in times.items()}


class _Counting(TorchDispatchMode):
    """Counts multiplications of matrix products; `FlopCounterMode` would read every output, logits to come too."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in _PRODUCTS:
            count = flop_registry[func.overloadpacket]
            self.counted += count(*args, **(kwargs or {}), out_val=found) // 2  # and as many sums
        return found


_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}


def multiplications(action: Callable[[], Any]) -> int:
    """Multiplications of matrix products, forward and backward: the linear layers; attention's kernels are fused."""
    with _Counting() as counting:
        action()
    return counting.counted


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some values; of a single one it is nothing."""
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median(values), low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(times: Mapping[str, Sequence[float]], name: str, to: str) -> Spread:
    """The spread of the ratios of two rivals, each of one round."""
    return Spread.of([one / other for one, other in zip(times[name], times[to], strict=True)])
