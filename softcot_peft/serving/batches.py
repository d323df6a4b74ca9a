"""`Batches`: makes embeddings in a thread of its own, for all prompts that wait at the same time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from threading import Condition, Thread
from typing import Generic, TypeVar

_T = TypeVar("_T")

Embed = Callable[[Sequence[Sequence[int]]], list[_T]]  # prompts to what is made of each


class Batches(Generic[_T]):
    """A thread that runs prompts of the same adapter together as soon as it is free.

    Prompts of an adapter that arrive while a batch runs form the next one. The adapter whose prompt has waited longest
    comes first. A prompt that fails does not affect the others of its batch.

    Example:
        ```python
        import torch
        from softcot_peft.serving.batches import Batches

        batches = Batches({"zeros": lambda rows: [torch.zeros(len(row) + 4, 8) for row in rows]})
        print(batches.submit("zeros", [1, 2, 3]).result().shape)  # (7, 8)
        batches.close()
        ```

    Args:
        adapters: The function that embeds prompts, by adapter.
        max_rows: Number of prompts in a batch.
        max_tokens: Number of tokens in a batch, with padding. A longer prompt runs alone.
    """

    def __init__(self, adapters: Mapping[str, Embed[_T]], max_rows: int = 32, max_tokens: int = 16384) -> None:
        self._adapters = dict(adapters)
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._waiting: deque[tuple[str, list[int], Future[_T]]] = deque()
        self._changed = Condition()
        self._closed = False
        self._thread = Thread(target=self._run, name="softcot-assistants", daemon=True)
        self._thread.start()

    def submit(self, adapter: str, input_ids: Sequence[int]) -> Future[_T]:
        """Return what is made of a prompt, later. Cancelling the result takes a waiting prompt out.

        Raises:
            RuntimeError: The thread was closed.
        """
        future: Future[_T] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("No embeddings are made any more: the server is shutting down.")
            self._waiting.append((adapter, list(input_ids), future))
            self._changed.notify()
        return future

    async def embed(self, adapter: str, input_ids: Sequence[int]) -> _T:
        """As `submit`, without blocking the event loop. A cancelled request is not run."""
        return await asyncio.wrap_future(self.submit(adapter, input_ids))

    def close(self) -> None:
        """Finish the batch that runs, if any, and fail the prompts that wait."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify()
        for _, _, future in waiting:
            future.cancel()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                batch = self._next()
            running = [item for item in batch if item[2].set_running_or_notify_cancel()]
            if running:
                self._embed(running)

    def _next(self) -> list[tuple[str, list[int], Future[_T]]]:
        """Take the prompts of the next batch from those that wait."""
        first = self._waiting[0][0]
        batch: list[tuple[str, list[int], Future[_T]]] = []
        others: deque[tuple[str, list[int], Future[_T]]] = deque()
        longest = 0
        for item in self._waiting:
            width = max(longest, len(item[1]))
            fits = len(batch) < self._max_rows and width * (len(batch) + 1) <= self._max_tokens
            if item[0] == first and (fits or not batch):
                batch.append(item)
                longest = width
            else:
                others.append(item)
        self._waiting = others
        return batch

    def _embed(self, batch: list[tuple[str, list[int], Future[_T]]]) -> None:
        name = batch[0][0]
        try:
            found = self._adapters[name]([ids for _, ids, _ in batch])
        except Exception as error:  # an assistant can fail in any way, and must not end the thread
            if len(batch) == 1:
                batch[0][2].set_exception(error)
                return
            for item in batch:
                self._embed([item])
            return
        for (_, _, future), embeds in zip(batch, found, strict=True):
            future.set_result(embeds)
