r"""Run the study of real models and write `docs/real-models.md` with its figures; `make real` calls it.

    python examples/real.py --models FOLDER --data-dir DATA --part pilot

Parts: `rationales`, `pilot`, `tries`, `final`; without `--part` all of them in this order. `--plan` prints each part's
jobs with estimated times and starts nothing. `--part protocol` writes what the pilot and the tries chose into
docs/real-models-protocol.md, without which the final part refuses to touch the test files. `--part page` writes the
page from what is finished, and `--part adapters` copies the trained adapters of pairs A and B to examples/adapters/.

FOLDER has a subfolder for each model: two or three, told apart by the size of their weights. Without it, models are
loaded from the Hub. Each job writes a file, so an interrupted run resumes where it stopped. Jobs run one after the
other in one process with all cores; with `--processes` several run at once, which pays on an accelerator.

`--size cpu` takes about 12 hours on two cores. `--size full` is for an accelerator: longer training, and all test
questions of GSM8K. `--size trial` runs a tiny version of every part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from results.runner import quiet, run, workers
from results.store import Store
from sources import check_source
from study import plan, protocol
from study.adapters import publish
from study.final import Final
from study.jobs import Job
from study.made import Setting, code_state
from study.page import finished, write
from study.work import perform

HERE = Path(__file__).parent
HUB = {
    "small": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "medium": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    "large": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
}
SIZES = {"cpu": plan.Sizes(), "full": plan.FULL, "trial": plan.SMALL}
TRIAL_TOKENS = 24


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Run the study of real models, and write the results.")
    add = parser.add_argument
    add("--models", type=Path, help="folder with a subfolder for each model; default: models from the Hub")
    add("--data-dir", help="folder with the original files of the data sets, instead of the Hub")
    add("--note", default="", help="a sentence about the models for the page, such as how their weights were made")
    add("--part", choices=[*plan.PARTS, "protocol", "page", "adapters"], help="default: all parts in order")
    add("--plan", action="store_true", help="print the jobs of the parts with estimated times, and start nothing")
    add("--output-dir", type=Path, default=Path("runs/real"), help="folder of the results")
    add("--docs", type=Path, default=HERE.parent / "docs", help="folder of the protocol, the page and its figures")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--size", choices=SIZES, default="cpu", help="of the study; the numbers of a trial are meaningless")
    add("--processes", type=int, default=1, help="jobs that run at once")
    add("--batch", type=int, default=16, help="answers generated at once; an accelerator is faster with hundreds")
    return parser.parse_args(argv)


def weights(folder: Path) -> int:
    """Return the size in bytes of a model's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def find_models(folder: Path | None) -> dict[str, str]:
    """Return a folder or Hub id for each size of model.

    Raises:
        ValueError: The folder does not have two or three models.
    """
    if folder is None:
        return HUB
    if not folder.is_dir():
        check_source("--models", str(folder))
    found = sorted((path.parent for path in folder.glob("*/config.json")), key=lambda path: (weights(path), path))
    if len(found) not in (2, 3):
        raise ValueError(
            f"`--models` must be a folder with two or three models, each in a subfolder, got {len(found)} in {folder}."
        )
    return dict(zip(HUB, map(str, found), strict=False))


def identity(models: dict[str, str], data_dir: str | None) -> str:
    """Return a hash of the models and the data that results depend on."""
    digest = hashlib.sha256(str(data_dir is None).encode())
    for size, name in models.items():
        config = Path(name, "config.json")
        described = [config.read_text(encoding="utf-8"), weights(Path(name))] if config.is_file() else [name]
        digest.update(json.dumps([size, *described]).encode())
    for path in sorted(path for path in Path(data_dir).rglob("*.*") if path.is_file()) if data_dir else ():
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def sources() -> list[Path]:
    """Return the files that a result depends on; each result says in which state they were."""
    names = ("data", "made", "probing", "stretches", "systems", "tasks", "training", "work")
    code = [HERE / "study" / f"{name}.py" for name in names]
    evaluation = (HERE.parent / "evaluation").glob("*.*")
    return [*code, *HERE.glob("baselines/*.py"), *evaluation, *(HERE.parent / "softcot_peft").rglob("*.py")]


def jobs_of(part: str, store: Store, sizes: plan.Sizes, setting: Setting, docs: Path) -> list[Job]:
    """Return the jobs of a part that are known, given the results so far.

    Raises:
        ValueError: A part that it depends on is not finished, or the protocol is missing.
    """
    if part == "rationales":
        return [job for jobs in setting.writings.values() for job in jobs]
    if part == "pilot":
        return list(plan.pilots(store, sizes))
    if part == "tries":
        return list(dict.fromkeys(plan.all_tries(plan.rates_of(store, sizes), sizes)))
    return Final(protocol.read(docs), sizes, tuple(setting.models)).all()


def planned(part: str, store: Store, sizes: plan.Sizes, setting: Setting, docs: Path) -> list[Job]:
    """As `jobs_of`, with middle values for what earlier parts have not chosen yet."""
    try:
        return jobs_of(part, store, sizes, setting, docs)
    except ValueError:
        rates = {system: rates[len(rates) // 2] for system, rates in plan.FIRST_RATES.items()}
        if part == "tries":
            return list(dict.fromkeys(plan.all_tries(rates, sizes)))
        return Final(protocol.choices(rates, {"rationales": "own"}, sizes), sizes, tuple(setting.models)).all()


def print_plan(parts: Sequence[str], store: Store, sizes: plan.Sizes, setting: Setting, docs: Path) -> None:
    """Print every job of the parts with its estimated minutes, and the sums."""
    total = 0.0
    for part in parts:
        jobs = planned(part, store, sizes, setting, docs)
        left = [job for job in jobs if job not in store]
        for job in jobs:
            print(f"  {plan.seconds(job) / 60:5.1f} min  {'done' if job in store else '    '}  {job.name}")
        total += plan.hours(left)
        print(f"{part}: {len(jobs)} jobs, {plan.hours(jobs):.1f} h; {len(left)} jobs left, {plan.hours(left):.1f} h\n")
    print(f"Left in all: {total:.1f} h on two cores in bfloat16, with models of 0.1, 0.5 and 1.5 billion parameters.")


def run_part(
    part: str, store: Store, sizes: plan.Sizes, setting: Setting, docs: Path, pool: Executor | None = None
) -> None:
    """Run the jobs of a part; the pilot's search adds jobs until each system has worse values on both sides."""
    while any(job not in store for job in jobs_of(part, store, sizes, setting, docs)):
        jobs, needs = jobs_of(part, store, sizes, setting, docs), partial(plan.needs, writings=setting.writings)
        run(jobs, store, part, perform, setting, pool=pool, minutes=lambda job: plan.seconds(job) / 60, needs=needs)
    jobs = jobs_of(part, store, sizes, setting, docs)
    states = {store[job]["code"] for job in jobs} | {setting.code}
    if len(states) > 1:
        print(f"Results of {part} are from {len(states)} states of the code. Delete {store.folder} to redo them.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts, then write the page."""
    args = parse_args(argv)
    quiet()
    models, sizes = find_models(args.models), SIZES[args.size]
    store = Store(args.output_dir / f"{identity(models, args.data_dir)}-{args.size}")
    setting = Setting(models, store.folder, args.data_dir, plan.writings(sizes, models), args.dtype, batch=args.batch)
    setting = replace(setting, code=code_state(sources()))
    if args.size == "trial":
        setting = replace(setting, max_new_tokens=TRIAL_TOKENS)
    parts = plan.PARTS if args.part is None else [args.part] if args.part in plan.PARTS else []
    if args.plan:
        print_plan(parts or plan.PARTS, store, sizes, setting, args.docs)
        return
    with workers(args.processes) if parts and args.processes > 1 else nullcontext() as pool:
        for part in parts:
            run_part(part, store, sizes, setting, args.docs, pool)
    if args.part == "protocol":
        print(protocol.write(args.docs, store, sizes))
    elif args.part == "adapters":
        folder = args.docs.parent / "examples" / "adapters"
        for made in publish(finished(store, sizes, setting, args.docs), setting, HUB, folder, args.note):
            print(f"Wrote {made}.")
    elif args.part == "page" or "final" in parts:
        write(store, sizes, setting, args.docs, args.note)
        print(f"Wrote {args.docs / 'real-models.md'}.")
    elif args.part in ("pilot", "tries"):
        print(protocol.summary(store, sizes))


if __name__ == "__main__":
    main()
