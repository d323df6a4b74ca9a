"""Runs the jobs that are not in a store yet, in this process or in a pool, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from typing import Any

from tqdm import tqdm

from .store import Store

Result = dict[str, Any]
MINUTES = (
    "{desc}: {percentage:3.0f}% |{bar}| {n:.0f} of {total:.0f} min estimated [{elapsed}, {remaining} left{postfix}]"
)


def in_turn(
    jobs: Sequence[Any], work: Callable[..., Result], arguments: Sequence[Any]
) -> Iterator[tuple[Any, Result]]:
    """Yield each job with its result, one after the other in this process."""
    for job in jobs:
        try:
            result = work(job, *arguments)
        except Exception as error:
            raise RuntimeError(f"The job {job.name!r} failed.") from error
        yield job, result


def in_pool(
    jobs: Sequence[Any], work: Callable[..., Result], arguments: Sequence[Any], pool: Executor
) -> Iterator[tuple[Any, Result]]:
    """Yield each job with its result as soon as it is available."""
    running = {pool.submit(work, job, *arguments): job for job in jobs}
    while running:
        done = wait(running, return_when=FIRST_COMPLETED).done
        for future in sorted(done, key=lambda future: future.exception() is not None):  # store results before raising
            job = running.pop(future)
            if future.exception() is not None:
                raise RuntimeError(f"The job {job.name!r} failed.") from future.exception()
            yield job, future.result()


def run(
    jobs: Sequence[Any],
    store: Store,
    what: str,
    work: Callable[..., Result],
    *arguments: Any,
    pool: Executor | None = None,
    minutes: Callable[[Any], float] | None = None,
) -> None:
    """Run the jobs that are not finished, and store each result as soon as it is available.

    Args:
        jobs: All jobs.
        store: Results of the finished ones.
        what: Description for the progress bar.
        work: Function of a job and the arguments that returns its result.
        *arguments: Further arguments of `work`.
        pool: Pool of processes; without one, jobs run in this process in their order.
        minutes: Estimated time of a job, which the remaining time is derived from. `None`: all take equally long.
    """
    missing = [job for job in jobs if job not in store]
    cost = minutes or (lambda job: 1)
    total, ahead = sum(map(cost, jobs)), sum(map(cost, missing))
    shape: dict[str, Any] = {"bar_format": MINUTES} if minutes else {"unit": "job", "smoothing": 0.1}
    with tqdm(total=total, initial=total - ahead, desc=what, **shape) as bar:
        for job, result in in_pool(missing, work, arguments, pool) if pool else in_turn(missing, work, arguments):
            store[job] = result
            bar.set_postfix_str(job.name, refresh=False)
            bar.update(cost(job))
