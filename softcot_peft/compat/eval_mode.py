"""Runs a model in eval mode, or without gradients of its weights, and restores each module or weight afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock

from torch import nn

_lock = Lock()
_users: dict[tuple[str, int], int] = {}  # number of users of a flag that is off, by its name and the object's id


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, and restore each module's own mode afterwards.

    This sets only the flag, since a module's `train` method may do more, such as unmerging weights.
    """
    # Skips 4-bit layers (bitsandbytes 0.50): in eval mode, they only pack their weights for good on some CPUs.
    with _switched_off("training", [module for module in model.modules() if not hasattr(module, "compute_dtype")]):
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Run a model so that gradients flow through it, but not into its weights."""
    with _switched_off("requires_grad", list(model.parameters())):
        yield


@contextmanager
def _switched_off(flag: str, objects: Iterable[object]) -> Iterator[None]:
    """Set a flag to `False`. Threads and models may share objects; the last user restores an object."""
    with _lock:
        switched = [(found, (flag, id(found))) for found in objects]
        switched = [(found, key) for found, key in switched if getattr(found, flag) or key in _users]
        for found, key in switched:
            _users[key] = _users.get(key, 0) + 1
            setattr(found, flag, False)
    try:
        yield
    finally:
        with _lock:
            for found, key in switched:
                _users[key] -= 1
                if not _users[key]:
                    del _users[key]
                    setattr(found, flag, True)
