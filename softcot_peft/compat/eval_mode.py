"""Runs a model in eval mode and restores the mode of each module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch import nn

_lock = Lock()
_evaluating: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # modules to restore, and number of users


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, and restore each module's own mode afterwards.

    Threads and models may share modules; the last user restores a module. This sets only the flag, since a module's
    `train` method may do more, such as unmerging weights.
    """
    with _lock:
        # Skips 4-bit layers (bitsandbytes 0.50): in eval mode, they only pack their weights for good on some CPUs.
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
