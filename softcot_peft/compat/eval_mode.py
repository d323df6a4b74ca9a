"""Runs a model in eval mode without changing what the user set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch import nn

_lock = Lock()
_evaluating: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # modules to put back, and who still needs them


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, and put every module back into its own mode afterwards.

    Threads and models may share modules: the last one to leave puts a module back. Sets the flags alone, since a
    module's own `train` may do more than that, such as unmerging weights.
    """
    with _lock:
        # In eval mode, 4-bit layers (bitsandbytes 0.50) pack their weights for good on some CPUs, and do no more.
        modules = [m for m in model.modules() if (m.training or m in _evaluating) and not hasattr(m, "compute_dtype")]
        for module in modules:
            _evaluating[module] = _evaluating.get(module, 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                _evaluating[module] -= 1
                if not _evaluating[module]:
                    del _evaluating[module]
                    module.training = True
