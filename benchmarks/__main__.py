r"""Measure the time and memory of SoftCoT and other methods, and write `docs/performance.md`; `make bench` calls it.

    python -m benchmarks [--size smoke|small|issue|7b|real] [--device cpu|cuda] [--repeats R] [--only SECTION ...]

The results of each size and device are stored next to the page, which shows all of them. With `--only`, the other
sections of an earlier run of the same size and device are kept, each with the environment of its run. Size `real` has
pretrained models and rows of GSM8K, from the Hub or from the folders `--models` and `--data-dir`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from tqdm import tqdm
from transformers.utils import logging

from .goals import goals
from .machine import environment, load
from .page import write
from .sections import FORMAT, SECTIONS, Bench, sections_of
from .sizes import SIZES

ROOT = Path(__file__).parents[1]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure the time and memory of SoftCoT and other methods."
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="models and batches; real takes 15 minutes, issue an hour")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--repeats", type=int, help="rounds per measurement; default: depends on the size")
    add("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    add("--models", type=Path, help="size real: folder with a subfolder for each model, instead of the Hub")
    add("--data-dir", help="size real: folder with `gsm8k/train.jsonl`, instead of the Hub")
    add("--threads", type=int, help="number of torch threads; default: torch's own")
    add("--docs", type=Path, help="folder of performance.md and its figures; runs/bench for smoke, else docs")
    args = parser.parse_args(argv)
    args.docs = args.docs or ROOT / ("runs/bench" if args.size == "smoke" else "docs")
    size = SIZES[args.size]
    if args.device == "cpu" and size.cuda_only:
        parser.error(f"`--size {args.size}` needs `--device cuda`.")
    args.only = args.only or sections_of(size)
    if unknown := set(args.only) - set(sections_of(size)):
        parser.error(f"`--only` must be among {', '.join(sections_of(size))} with this size, got {sorted(unknown)}.")
    if (args.models or args.data_dir) and not size.pretrained:
        parser.error(f"`--models` and `--data-dir` need `--size real`, got {args.size}.")
    if args.repeats is not None and args.repeats < 1:
        parser.error(f"`--repeats` must be at least 1, got {args.repeats}.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the selected sections, then write the page."""
    args, began = parse_args(argv), time.monotonic()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    # PEFT 0.21 reads an attribute that transformers 5.23 renamed
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    # PEFT's own, in every `generate` with prompt tuning
    warnings.filterwarnings("ignore", "Position ids are not supported", UserWarning)
    size = SIZES[args.size]
    bench = Bench(size, args.device, args.repeats or size.repeats, args.models, args.data_dir)
    file = args.docs / "performance" / f"{args.size}-{args.device}.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if results.get("format") != FORMAT:
        results = {"format": FORMAT, "sections": {}}
    file.parent.mkdir(parents=True, exist_ok=True)
    # not the folders of this machine
    local = {str(folder) for folder in (args.models, args.data_dir) if folder is not None}
    given = ["FOLDER" if each in local else each for each in (sys.argv[1:] if argv is None else argv)]
    command = shlex.join(["python", "-m", "benchmarks", *given])
    results |= {"size": args.size, "device": args.device, "parameters": bench.parameters()}
    for name in tqdm([name for name in SECTIONS if name in args.only], desc=args.size, unit="section"):
        ran = environment(args.device == "cuda") | {"repeats": bench.repeats}
        found = SECTIONS[name](bench)
        results["sections"][name] = {"command": command, "environment": ran | {"load_after": load()}, "found": found}
        half = file.with_suffix(".half")
        half.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        os.replace(half, file)  # atomic, in case the run is interrupted
    write(args.docs)
    for goal in goals(results["sections"]):
        print("; ".join(goal.columns))
    print(f"Wrote {args.docs / 'performance.md'} in {(time.monotonic() - began) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
