"""Runs the jobs that are not in a store yet, in this process or in a pool, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from .store import Store

Result = dict[str, Any]
MINUTES = (
    "{desc}: {percentage:3.0f}% |{bar}| {n:.0f} of {total:.0f} min estimated [{elapsed}, {remaining} left{postfix}]"
)


def quiet() -> None:
    """Hide the libraries' progress bars and what they say about each model that is loaded."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # PEFT 0.21 reads an attribute that transformers 5.23 renamed
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)


def prepare() -> None:
    """Set up a worker: one thread, quiet, and exit if the parent process is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    quiet()


@contextmanager
def workers(number: int) -> Iterator[Executor]:
    """Start a pool of processes for jobs; if anything is raised, jobs that have not begun are dropped."""
    os.environ["TQDM_DISABLE"] = os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers at startup
    with ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), prepare) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
    jobs: Sequence[Any],
    work: Callable[..., Result],
    arguments: Sequence[Any],
    pool: Executor,
    ready: Callable[[Any], bool] = lambda job: True,
) -> Iterator[tuple[Any, Result]]:
    """Yield each job with its result as soon as it is available. A job starts when it is ready, or no other runs.

    After a failure no other job starts, but those that run are finished and yielded first.
    """
    waiting, running = list(jobs), {}
    failed: tuple[Any, BaseException] | None = None
    while waiting or running:
        able = [job for job in waiting if ready(job)] or (waiting if not running else [])
        running |= {pool.submit(work, job, *arguments): job for job in able}
        waiting = [job for job in waiting if job not in able]
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            if future.cancelled():
                continue
            if error := future.exception():
                failed, waiting = failed or (job, error), []
                for other in running:
                    other.cancel()
            else:
                yield job, future.result()
    if failed is not None:
        raise RuntimeError(f"The job {failed[0].name!r} failed.") from failed[1]


def run(
    jobs: Sequence[Any],
    store: Store,
    what: str,
    work: Callable[..., Result],
    *arguments: Any,
    pool: Executor | None = None,
    minutes: Callable[[Any], float] | None = None,
    needs: Callable[[Any], Sequence[Any]] = lambda job: (),
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
        needs: Returns the jobs whose results a job reads; in a pool it starts when they are stored.
    """
    missing = [job for job in jobs if job not in store]
    cost = minutes or (lambda job: 1)
    total, ahead = sum(map(cost, jobs)), sum(map(cost, missing))
    shape: dict[str, Any] = {"bar_format": MINUTES} if minutes else {"unit": "job", "smoothing": 0.1}
    given = (missing, work, arguments)
    with tqdm(total=total, initial=total - ahead, desc=what, **shape) as bar:
        for job, result in (
            in_pool(*given, pool, lambda job: all(each in store for each in needs(job))) if pool else in_turn(*given)
        ):
            store[job] = result
            bar.set_postfix_str(job.name, refresh=False)
            bar.update(cost(job))
