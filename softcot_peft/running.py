"""The pass that is running in this thread, for the wrapped embedding and thought sources. Threads share models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol


class Running(Protocol):
    """What is asked of a running pass from below."""

    writing: Any  # what the wrapped embedding writes, if anything


class Reading:
    """Runs while a source reads: an assistant may be the very base that the thoughts are for."""

    writing = None


READING = Reading()
RUNNING: ContextVar[Running | None] = ContextVar("softcot_pass", default=None)


@contextmanager
def reading() -> Iterator[None]:
    """Let a source read: passes of the base within are plain ones."""
    token = RUNNING.set(READING)
    try:
        yield
    finally:
        RUNNING.reset(token)
