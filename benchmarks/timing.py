"""Times methods in rounds, so that other load affects all of them equally, and counts multiplications."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median, quantiles
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import timer
from torch.utils.flop_counter import flop_registry
from tqdm import trange

Times = dict[str, list[float]]
Clock = Callable[[Callable[[], Any]], float]


def seconds(action: Callable[[], Any]) -> float:
    """Return the seconds of an action, synchronized with the accelerator."""
    before = timer()
    action()
    return timer() - before


def own(action: Callable[[], float]) -> float:
    """Return the time that an action has measured itself."""
    return action()


def interleave(
    actions: Mapping[str, Callable[[], Any]], repeats: int, what: str, clock: Clock = seconds, warmup: int = 1
) -> Times:
    """Time actions in rounds, each in random order, so that no action always follows the same one.

    `torch.utils.benchmark.Timer` does not do this: it times one statement after another, with a warm-up before each.

    Args:
        actions: Actions to time, by name.
        repeats: Number of rounds.
        what: Label of the progress bar.
        clock: Function that returns the seconds of an action.
        warmup: Number of initial rounds that are not counted.
    """
    times: Times = {name: [] for name in actions}
    chance = Random(0)
    gc.collect()
    for _ in trange(-warmup, repeats, desc=what, leave=False, unit="round"):
        gc.disable()  # as in timeit: garbage collection would be attributed to an arbitrary action
        try:
            for name in chance.sample(list(actions), len(actions)):
                times[name].append(clock(actions[name]))
        finally:
            gc.enable()
    return {name: found[warmup:] for name, found in times.items()}


def profiled(action: Callable[[], Any], parts: Mapping[str, str], device: torch.device) -> dict[str, float]:
    """Return the seconds of an action, and of the operations in it whose names begin as given.

    Args:
        action: Action to time.
        parts: Beginning of the names, by part. Backward passes that have a name of their own are parts of their own.
        device: Device of the models.
    """
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiler:
        whole = seconds(action)
    found = dict.fromkeys(parts, 0.0)
    for event in profiler.key_averages():
        for part, name in parts.items():
            if event.key.startswith(name):
                own = f"{part} backward" if event.key.endswith("backward") else part
                time = event.device_time_total if on_cuda else event.cpu_time_total
                found[own] = found.get(own, 0.0) + time / 1e6
    return {"whole": whole, **found}


class _Counting(TorchDispatchMode):
    """Counts multiplications of matrix products; `FlopCounterMode` would read every output."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in _PRODUCTS:
            count = flop_registry[func.overloadpacket]
            self.counted += count(*args, **(kwargs or {}), out_val=found) // 2  # without the additions
        return found


_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}


def multiplications(action: Callable[[], Any]) -> int:
    """Count multiplications of matrix products, forward and backward. Fused attention kernels are not included."""
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
        """Return the spread of values; it is zero for a single value."""
        low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median(values), low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(times: Mapping[str, Sequence[float]], name: str, to: str) -> Spread:
    """Return the spread of the ratios of two methods, each from one round."""
    return Spread.of([one / other for one, other in zip(times[name], times[to], strict=True)])


def shares(parts: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the share of each part in the sum of medians."""
    medians = {name: median(times) for name, times in parts.items()}
    return {name: time / sum(medians.values()) for name, time in medians.items()}
