r"""Evaluate a base, a SoftCoT adapter over it and its controls on the tasks of `evaluation/`.

    python examples/evaluate.py --base Qwen/Qwen2.5-7B-Instruct --adapter runs/gsm8k --tasks gsm8k,aqua --controls

lm-evaluation-harness does the work: prompts, batches, repeats, votes, logs. Data come from the Hub, or from local
files with `--data-dir`. Decoding is greedy; `--temperature 1 --seeds 41,42,43,44,45` samples as the paper does (arXiv
2502.12134), and `--samples 10` lets ten samples vote. Chat templates are always rendered with their generation prompt.

Every score is kept in `--output-dir` as soon as it is there; the same command goes on where it was stopped. On several
GPUs, run it with `accelerate launch`: each process answers a part of the questions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from blocks import write_whole
from controls import CONTROLS, average_thoughts, controlled
from huggingface_hub import file_exists
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from results.statistics import share
from results.store import fingerprint
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import softcot_peft  # noqa: F401  # registers the method, by which adapters are loaded

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # evaluation/ is no installed package
from evaluation.answers import answered  # noqa: E402

TASKS = ("gsm8k", "asdiv", "asdiv_aug", "aqua", "strategyqa", "date_understanding", "commonsenseqa")
VOTES = (2, 3, 5, 10, 20, 40)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Evaluate a base, a SoftCoT adapter and its controls.")
    add = parser.add_argument
    add("--base", required=True, help="Hub id or folder of the base")
    add("--adapter", help="Hub id or folder of a SoftCoT adapter; without one, the base alone is evaluated")
    add("--tasks", default=",".join(TASKS), help="some of %(default)s")
    add("--data-dir", help="folder with the data sets' own files, instead of the Hub")
    add("--controls", action="store_true", help="also evaluate with the thoughts changed: see controls.py")
    add("--inference-thoughts", type=int, help="N; without it, what the adapter's config says")
    add("--samples", type=int, default=1, help="answers to each question, which vote")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-p", type=float, default=1.0)
    add("--seeds", default="41", help="of sampling, separated by commas")
    add("--max-new-tokens", type=int, default=1024)
    add("--num-fewshot", type=int, default=0)
    add("--limit", type=int, help="only the first questions of each task")
    add("--batch-size", type=int, default=16)
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    add("--bf16", action=argparse.BooleanOptionalAction, default=bf16, help="default: on GPUs that support it")
    add("--output-dir", type=Path, default=Path("runs/evaluate"))
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant.

    Raises:
        ValueError: It says which option, what it must be, and what was found.
    """
    args.tasks = args.tasks.split(",")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    unknown = sorted(set(args.tasks) - set(TASKS))
    if unknown:
        raise ValueError(f"`--tasks` must be some of {', '.join(TASKS)}, got {', '.join(unknown)}.")
    if args.samples < 1:
        raise ValueError(f"`--samples` must be at least 1, got {args.samples}.")
    if args.temperature == 0 and (args.samples > 1 or len(args.seeds) > 1):
        raise ValueError(
            f"`--samples {args.samples}` and {len(args.seeds)} seeds need sampling, but `--temperature` is 0. Set it, "
            "to 1 as in the paper, say."
        )
    if args.controls and args.adapter is None:
        raise ValueError("`--controls` changes an adapter's thoughts, but `--adapter` is missing.")
    if args.controls and args.batch_size < 2:
        raise ValueError(f"`--controls` needs a `--batch-size` of at least 2, got {args.batch_size}.")


@dataclass(frozen=True)
class Question:
    """One score to be found: of a system on a task with a seed."""

    system: str
    control: str  # of `CONTROLS`; what makes the system of the adapted model
    task: str
    seed: int
    samples: int

    def file(self, folder: Path, settings: dict[str, Any]) -> Path:
        """Where the score is kept; other settings are another file."""
        described = json.dumps([asdict(self), settings], sort_keys=True, default=str)
        name = f"{self.task}_{self.system}_{self.seed}".replace(" ", "-").replace("'", "")
        return folder / f"{name}_{hashlib.sha256(described.encode()).hexdigest()[:8]}.json"


def questions(args: argparse.Namespace) -> list[Question]:
    """The base; with an adapter also SoftCoT; and its controls, which are asked once."""
    systems = {"base": "no thoughts", "SoftCoT": "soft thoughts"} if args.adapter else {"base": "soft thoughts"}
    controls = {name: name for name in CONTROLS[2:]} if args.controls else {}
    return [
        Question(system, control, task, seed, 1 if system in controls else args.samples)
        for task in args.tasks
        for system, control in (systems | controls).items()
        for seed in args.seeds
    ]


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """All that a score depends on but for its question."""
    files = [
        *(ROOT / "evaluation").iterdir(),
        ROOT / "examples" / "controls.py",
        *(ROOT / "softcot_peft").glob("*.py"),
    ]
    if args.adapter and Path(args.adapter).is_dir():
        files += [path for path in Path(args.adapter).iterdir() if path.suffix in (".json", ".safetensors", ".jinja")]
    left_out = ("tasks", "seeds", "samples", "controls", "batch_size", "output_dir")
    chosen = {name: value for name, value in vars(args).items() if name not in left_out}
    return chosen | {"files": fingerprint(path for path in files if path.is_file())}


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the adapter, as its chat template may write thought tokens; else the base's."""
    name, adapter = "tokenizer_config.json", args.adapter
    saved = adapter and ((Path(adapter) / name).is_file() if Path(adapter).is_dir() else file_exists(adapter, name))
    return AutoTokenizer.from_pretrained(adapter if saved else args.base, padding_side="left")


def load_task(manager: TaskManager, name: str, samples: int) -> ConfigurableTask:
    """A task with its data. The first of its samples is scored, and votes of the first of them."""
    full = f"softcot_{name}"
    ways = manager.load(full)["tasks"][full].config.filter_list
    extract, first = ways[0]["filter"]
    for count in sorted({k for k in VOTES if k < samples} | {samples} - {1}):
        vote = [{"function": "take_first_k", "k": count}, {"function": "custom", "filter_fn": answered}]
        ways.append({"name": f"vote of {count}", "filter": [extract, *vote, {"function": "majority_vote"}, first]})
    group = {"group": "evaluation", "task": [{"task": full, "repeats": samples, "filter_list": ways}]}
    return manager.load(group)["tasks"][full]


def batch_size_for(questions: int, size: int, processes: int) -> int:
    """The largest batch size up to `size` that leaves no question alone in a batch of any process.

    Raises:
        ValueError: There is none.
    """
    shares = {questions // processes, -(-questions // processes)} - {0}
    fitting = [tried for tried in range(2, size + 1) if all(share % tried != 1 for share in shares)]
    if 1 in shares or not fitting:
        raise ValueError(
            f"`--controls` gives a question the thoughts of another one in its batch, but {questions} questions in "
            f"{processes} processes leave one alone with any batch size up to {size}. Raise `--batch-size`, or set "
            "another `--limit`."
        )
    return fitting[-1]


class Evaluation:
    """A base in the harness, perhaps with an adapter, and the tasks that were loaded for it.

    Args:
        args: The command line's.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = load_tokenizer(args)
        # Without the harness's own tasks, of which it would read some ten thousand files.
        self.manager = TaskManager(
            include_path=str(ROOT / "evaluation"), include_defaults=False, metadata={"data_dir": args.data_dir}
        )
        self.harness = HFLM(
            pretrained=args.base,
            peft=args.adapter,
            tokenizer=self.tokenizer,
            batch_size=args.batch_size,
            dtype="bfloat16" if args.bf16 else "float32",
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        self.number = self.set_number() if args.adapter else 0
        # A base that has no turns goes on with another question, as in its examples.
        self.until = ["\n\n"] if args.num_fewshot and self.tokenizer.chat_template is None else []
        self.task: Callable[[str, int], ConfigurableTask] = lru_cache(2)(
            lambda name, samples: load_task(self.manager, name, samples)
        )

    def set_number(self) -> int:
        """Set the number of thoughts that was asked for, and tell which it is."""
        config = self.harness.model.peft_config[self.harness.model.active_adapter]
        config.inference_num_thought_tokens = self.args.inference_thoughts or config.inference_num_thought_tokens
        return config.inference_num_thought_tokens or config.num_thought_tokens

    def asked(self, task: ConfigurableTask) -> int:
        """How many questions of a task are asked."""
        return min(len(task.eval_docs), self.args.limit or len(task.eval_docs))

    def average(self, task: ConfigurableTask) -> torch.Tensor:
        """The thoughts averaged over the first questions of a task, `(N, H_base)`."""
        prompts = [task.doc_to_text(doc) for doc in task.eval_docs.select(range(min(64, len(task.eval_docs))))]
        if self.tokenizer.chat_template is not None:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = [self.harness.apply_chat_template(turn) for turn in turns]
        special = self.tokenizer.chat_template is None  # a chat template writes them itself
        return average_thoughts(self.harness.model, self.tokenizer, prompts, add_special_tokens=special)

    def score(self, question: Question, folder: Path) -> dict[str, Any] | None:
        """Find one score; None in all processes but the first.

        Args:
            question: What to find.
            folder: For the harness's logs, and the answers of an evaluation that was stopped.
        """
        args, harness, task = self.args, self.harness, self.task(question.task, question.samples)
        harness.batch_size_per_gpu = args.batch_size
        if question.control == "another question's":
            harness.batch_size_per_gpu = batch_size_for(self.asked(task), args.batch_size, harness.world_size)
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
        decoding = sampling if args.temperature > 0 else {"do_sample": False}
        # A saved template writes thought tokens for the base, too, unless it is told to write none.
        harness.chat_template_args = {"num_thought_tokens": 0 if question.control == "no thoughts" else self.number}
        average = self.average(task) if question.control == "average" else None
        tracker = EvaluationTracker(output_path=str(folder / "logs"))
        change = controlled(harness.model, question.control, average, question.seed) if args.adapter else nullcontext()
        with change:
            found = simple_evaluate(
                model=harness,
                tasks=[task],
                task_manager=self.manager,
                num_fewshot=args.num_fewshot,
                limit=args.limit,
                apply_chat_template=self.tokenizer.chat_template is not None,
                gen_kwargs={**decoding, "max_gen_toks": args.max_new_tokens, "until": self.until},
                use_cache=str(folder / "answers"),
                evaluation_tracker=tracker,
                bootstrap_iters=0,
                random_seed=question.seed,
                numpy_random_seed=question.seed,
                torch_random_seed=question.seed,
                fewshot_random_seed=question.seed,
            )
        if found is None:
            return None
        (name,) = found["samples"]
        logged = found.pop("samples")[name]
        tracker.save_results_aggregated(found, {name: logged})
        tracker.save_results_samples(name, logged)
        return {**asdict(question), **self.told(logged)}

    def told(self, logged: list[dict[str, Any]]) -> dict[str, Any]:
        """Which answers are right, by the way from samples to an answer, and how long the answers are."""
        right: dict[str, list[int]] = {}
        for sample in sorted(logged, key=lambda sample: sample["doc_id"]):
            right.setdefault(sample["filter"], []).append(int(sample["exact_match"]))
        texts = [text for sample in logged if sample["filter"] == "first" for text in sample["resps"][0]]
        lengths = [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        return {"right": right, "tokens": sum(lengths) / len(lengths)}


def table(scores: Sequence[dict[str, Any]]) -> str:
    """Right answers in %, with their 95 % intervals over questions and seeds, by system and task; tokens written."""
    tasks = list(dict.fromkeys(score["task"] for score in scores))
    rows: dict[str, dict[str, list[Any]]] = {}
    for score in scores:
        for way, right in score["right"].items():
            name = score["system"] if way == "first" else f"{score['system']}, {way}"
            rows.setdefault(name, {}).setdefault(score["task"], []).append((right, score["tokens"]))
    head = ["right, % [95 % interval]", *tasks, "tokens of an answer"]
    lines = [head, ["---"] * len(head)]
    for name, found in rows.items():
        cells = [str(share([right for right, _ in found[task]])) if task in found else "" for task in tasks]
        lengths = [tokens for runs in found.values() for _, tokens in runs]
        lines.append([name, *cells, f"{sum(lengths) / len(lengths):.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Find every score that is not kept yet, and print them all."""
    args = parse_args(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it says at every task how it could be set
    evaluation, settings = Evaluation(args), settings_of(args)
    files = {question: question.file(args.output_dir / "scores", settings) for question in questions(args)}
    missing = [question for question, file in files.items() if not file.exists()]  # before any process writes one
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
        print(f"\n{printed}\n\nScores in {args.output_dir / 'results.json'}; answers beside each score.")


if __name__ == "__main__":
    main()
