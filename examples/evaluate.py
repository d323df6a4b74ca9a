r"""Evaluate a base, a SoftCoT adapter and its controls on the tasks of `evaluation/`.

    python examples/evaluate.py --base Qwen/Qwen2.5-7B-Instruct --adapter runs/gsm8k --tasks gsm8k,aqua --controls

Prompts, batches, repeats, votes and logs are handled by lm-evaluation-harness. Data are loaded from the Hub, or from
local files with `--data-dir`. Decoding is greedy by default; `--temperature 1 --seeds 41,42,43,44,45` samples as in
the paper (arXiv 2502.12134), and `--samples 10` votes over ten samples. Chat templates are always rendered with their
generation prompt.

An adapter with several chains (SoftCoT++, arXiv 2505.11484) answers each question once for each chain, or as often as
`--samples` says, and all answers have equal votes. Chains take turns: the single score is that of the first answer of
the first chain, and the first k answers come from k chains if there are as many. `--chains 0,2` uses some of them.
Controls change the thoughts of the first chain.

`--engine vllm` answers with vLLM, if that is installed. In float32 the answers are the same; in bfloat16 the engine
rounds differently, so that some answers differ.

Each score is saved in `--output-dir` as soon as it is computed, so the same command resumes an interrupted run. To use
several GPUs, run the script with `accelerate launch`: each process answers a part of the questions.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blocks import write_whole
from harness import Evaluation, Question
from precision import has_fast_bfloat16
from results.statistics import share
from results.store import fingerprint
from sources import check_source
from tqdm.auto import tqdm

from softcot_peft.analysis import CONTROLS

ROOT = Path(__file__).parents[1]
TASKS = ("gsm8k", "asdiv", "asdiv_aug", "aqua", "strategyqa", "date_understanding", "commonsenseqa")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Evaluate a base, a SoftCoT adapter and its controls.")
    add = parser.add_argument
    add("--base", required=True, help="Hub id or folder of the base")
    add("--adapter", help="Hub id or folder of an adapter, SoftCoT's or another method's; without one, the base alone")
    add("--tasks", default=",".join(TASKS), help="comma-separated tasks; default: %(default)s")
    add("--data-dir", help="folder with the original files of the data sets, instead of the Hub")
    add("--controls", action="store_true", help="also evaluate with changed thoughts; see softcot_peft.analysis")
    add("--inference-thoughts", type=int, help="N; default: as in the adapter's config")
    add("--chains", help="comma-separated chains that answer, from 0; default: all of the adapter's")
    add("--samples", type=int, default=1, help="number of answers per question, and chain, for majority voting")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-p", type=float, default=1.0)
    add("--seeds", default="41", help="comma-separated seeds for sampling")
    add("--max-new-tokens", type=int, default=1024)
    add("--num-fewshot", type=int, default=0)
    add("--limit", type=int, help="only the first questions of each task")
    add("--engine", choices=("transformers", "vllm"), default="transformers", help="vllm must be installed")
    add("--batch-size", type=int, default=16)
    bf16 = has_fast_bfloat16()
    help_ = "default: on GPUs and CPUs with bfloat16 units"
    add("--bf16", action=argparse.BooleanOptionalAction, default=bf16, help=help_)
    add("--output-dir", type=Path, default=Path("runs/evaluate"))
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Validate the options.

    Raises:
        ValueError: If an option has an invalid value, or options contradict each other.
    """
    args.tasks = args.tasks.split(",")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    args.chains = [int(chain) for chain in args.chains.split(",")] if args.chains else None
    unknown = sorted(set(args.tasks) - set(TASKS))
    if unknown:
        raise ValueError(f"`--tasks` must be some of {', '.join(TASKS)}, got {', '.join(unknown)}.")
    for name in ("samples", "limit", "inference_thoughts"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}.")
    if args.chains and (min(args.chains) < 0 or len(set(args.chains)) < len(args.chains)):
        raise ValueError(f"`--chains` must be different numbers from 0, got {', '.join(map(str, args.chains))}.")
    for name in ("base", "adapter"):
        if getattr(args, name):
            check_source(f"--{name}", getattr(args, name))
    if args.temperature == 0 and (args.samples > 1 or len(args.seeds) > 1):
        raise ValueError(
            f"`--samples {args.samples}` and {len(args.seeds)} seeds need sampling, but `--temperature` is 0. Set it "
            "to 1, for example, as in the paper."
        )
    if args.adapter is None and (args.controls or args.inference_thoughts or args.chains):
        raise ValueError(
            "`--controls`, `--inference-thoughts` and `--chains` change an adapter's thoughts, but there is no "
            "`--adapter`."
        )
    if args.engine == "vllm" and (args.controls or args.inference_thoughts or args.chains):
        raise ValueError(
            "`--controls`, `--inference-thoughts` and `--chains` change an adapter's thoughts, which `--engine vllm` "
            "cannot. Use `--engine transformers`."
        )
    if args.controls and args.batch_size < 2:
        raise ValueError(f"`--controls` needs a `--batch-size` of at least 2, got {args.batch_size}.")


def questions(args: argparse.Namespace, method: str, chains: tuple[int, ...] | None) -> list[Question]:
    """Return the scores to compute: the base, the adapter's method, and its controls.

    Controls are sampled once, with the first of the chains that answer.
    """
    several = chains or (0,)
    systems = {"base": "none", method: "own"} if args.adapter else {"base": "own"}
    changed = {label: name for name, label in CONTROLS.items() if name not in ("own", "none")}
    controls = changed if args.controls else {}
    answering = {method: (args.samples, several)} | dict.fromkeys(controls, (1, several[:1]))
    return [
        Question(system, control, task, seed, *answering.get(system, (args.samples, (0,))))
        for task in args.tasks
        for system, control in (systems | controls).items()
        for seed in args.seeds
    ]


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return everything that a score depends on, except its question."""
    files = [
        *(ROOT / "evaluation").iterdir(),
        ROOT / "examples" / "harness.py",
        ROOT / "examples" / "engine.py",
        *(ROOT / "softcot_peft").rglob("*.py"),
    ]
    if args.adapter and Path(args.adapter).is_dir():
        files += [path for path in Path(args.adapter).iterdir() if path.suffix in (".json", ".safetensors", ".jinja")]
    left_out = ("tasks", "seeds", "samples", "chains", "controls", "batch_size", "output_dir")
    chosen = {name: value for name, value in vars(args).items() if name not in left_out}
    return chosen | {"files": fingerprint(path for path in files if path.is_file())}


def table(scores: Sequence[dict[str, Any]]) -> str:
    """Return a table of accuracies with 95 % intervals by system and task, and of generated tokens per answer."""
    tasks = list(dict.fromkeys(score["task"] for score in scores))
    rows: dict[str, dict[str, list[Any]]] = {}
    for score in scores:
        for way, right in score["right"].items():
            name = score["system"] if way == "first" else f"{score['system']}, {way}"
            rows.setdefault(name, {}).setdefault(score["task"], []).append((right, score["tokens"]))
    head = ["accuracy, % [95 % interval]", *tasks, "tokens per answer"]
    lines = [head, ["---"] * len(head)]
    for name, found in rows.items():
        cells = [
            str(share([right for right, _ in found[task]], same_questions=True)) if task in found else ""
            for task in tasks
        ]
        lengths = [tokens for runs in found.values() for _, tokens in runs]
        lines.append([name, *cells, f"{sum(lengths) / len(lengths):.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Compute the missing scores, then print all scores."""
    args = parse_args(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it logs the settings of every task
    evaluation, settings = Evaluation(args), settings_of(args)
    files = {
        question: question.file(args.output_dir / "scores", settings)
        for question in questions(args, evaluation.method, evaluation.chains)
    }
    missing = [question for question, file in files.items() if not file.exists()]  # before any process writes a file
    for question in tqdm(missing, desc="scores", disable=evaluation.harness.rank != 0):
        score = evaluation.score(question, files[question].with_suffix(""))
        if score is not None:
            write_whole(files[question], json.dumps(score))
    if evaluation.harness.rank == 0:
        scores = [json.loads(file.read_text(encoding="utf-8")) for file in files.values()]
        printed = table(scores)
        results = {"settings": settings, "scores": scores}
        write_whole(args.output_dir / "results.json", json.dumps(results, indent=1, default=str))
        write_whole(args.output_dir / "results.md", printed + "\n")
        print(f"\n{printed}\n\nScores are in {args.output_dir / 'results.json'}, answers next to each score.")


if __name__ == "__main__":
    main()
