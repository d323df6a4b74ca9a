"""Peak memory of a call, above the memory in use before it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of live tensors created within the context, and their peak.

    The result is the same in every run, because it depends on no clock or allocator. Temporary memory of operations
    is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):  # unknown inputs existed before; results can be views
            if isinstance(value, Tensor):
                self._count(value.untyped_storage(), made=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage(), made=True)
        return result

    def _count(self, storage: torch.UntypedStorage, made: bool) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes() if made else 0
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def peak_bytes(run: Callable[..., Any], *args: Any) -> int:
    """Return the peak bytes of live tensors while a function runs, above those that existed before."""
    with PeakBytes() as counted:
        result = run(*args)
    del result
    return counted.peak


def peak(run: Callable[[], Any], device: torch.device) -> int:
    """Return the peak bytes above those in use before: counted tensors on a CPU, the allocator's statistics on CUDA.

    Args:
        run: Function to measure. It has run before, so one-time allocations already exist.
        device: Device it runs on.
    """
    if device.type != "cuda":
        return peak_bytes(run)
    gc.collect()  # garbage freed during the run would hide part of the peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
