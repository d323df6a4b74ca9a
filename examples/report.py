r"""Run every experiment on the small pair and write `docs/results.md` with its figures; `make report` calls it.

    python examples/report.py [--output-dir runs/report] [--docs docs]

Jobs run in parallel processes with one thread each, by default one per core. Each job writes a file, so an interrupted
report resumes where it stopped. Results of another state of the code are never reused. `--small` runs a tiny version
of every experiment as a trial.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from results.jobs import Job, experiments, makings, tuning
from results.page import write
from results.runner import run as run_jobs
from results.runner import workers
from results.store import Store, fingerprint
from results.work import SMALL, Sizes, perform
from small_pair import load_or_make

HERE = Path(__file__).parent
Rates = dict[str, float]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Run every experiment on the small pair and write the results.")
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("runs/report"), help="folder of the results")
    add("--docs", type=Path, default=HERE.parent / "docs", help="folder of results.md and its figures")
    add("--pair", type=Path, default=HERE / "pair", help="folder of the pair; created if missing")
    add("--processes", type=int, default=os.cpu_count(), help="number of parallel jobs, each on one core")
    add("--small", action="store_true", help="a few steps and problems; the numbers are meaningless")
    return parser.parse_args(argv)


def sources(pair: Path) -> list[Path]:
    """Return the files that a result depends on."""
    results = [HERE / "results" / name for name in ("work.py", "variants.py")]
    code = [*HERE.glob("baselines/*.py"), HERE / "small_pair.py", *results]
    return [*code, *(HERE.parent / "softcot_peft").rglob("*.py"), *pair.rglob("*.json"), *pair.rglob("*.safetensors")]


def do(jobs: Sequence[Job], store: Store, sizes: Sizes, pair: Path, pool: Executor, what: str) -> None:
    """Run the jobs that are not finished, and store each result as soon as it is available."""
    run_jobs(jobs, store, what, perform, sizes, pair, store.folder, pool=pool)


def best_rates(store: Store) -> Rates:
    """Return the learning rate with the most correct answers by `Run.label`; ties go to the lowest loss."""
    return {
        label: max(
            (job for job in tuning() if job.label == label),
            key=lambda job: (sum(store[job]["right"]), -store[job]["loss"]),
        ).learning_rate
        for label in dict.fromkeys(job.label for job in tuning())
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run all jobs, then write the page."""
    args, began = parse_args(argv), time.monotonic()
    load_or_make(args.pair)
    sizes = SMALL if args.small else Sizes()
    store = Store(args.output_dir / (fingerprint(sources(args.pair)) + "-small" * args.small))
    with workers(args.processes) as pool:
        do([*makings(), *tuning()], store, sizes, args.pair, pool, "models and learning rates")
        rates = best_rates(store)
        do(experiments(rates, sizes.seeds), store, sizes, args.pair, pool, "experiments")
    write(store, rates, sizes, args.docs)
    print(f"Wrote {args.docs / 'results.md'} in {(time.monotonic() - began) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
