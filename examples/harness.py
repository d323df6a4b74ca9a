"""Computes single scores of a base, optionally with an adapter, with lm-evaluation-harness."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from engine import ADAPTER, Engine
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.tasks import TaskManager
from peft import PeftConfig
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import cached_file

from softcot_peft import SoftCoTConfig
from softcot_peft.analysis import mean_thoughts, with_thoughts
from softcot_peft.live_rows import LiveRows

sys.path.append(str(Path(__file__).parents[1]))  # evaluation/ is not an installed package
from evaluation.answers import answered

TASKS = Path(__file__).parents[1] / "evaluation"
VOTES = (2, 3, 5, 10, 20, 40)


@dataclass(frozen=True)
class Question:
    """One score to compute: of a system on a task with a seed."""

    system: str
    control: str  # one of `CONTROLS`, applied to the adapted model
    task: str
    seed: int
    samples: int  # answers by each of `chains`
    chains: tuple[int, ...] = (0,)  # of the adapter, that answer in turn

    @property
    def answers(self) -> int:
        """Number of answers to each question of the task."""
        return self.samples * len(self.chains)

    def file(self, folder: Path, settings: dict[str, Any]) -> Path:
        """Return the file of the score; different settings have different files."""
        described = json.dumps([asdict(self), settings], sort_keys=True, default=str)
        name = f"{self.task}_{self.system}_{self.seed}".replace(" ", "-").replace("'", "")
        return folder / f"{name}_{hashlib.sha256(described.encode()).hexdigest()[:8]}.json"


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """Load the adapter's tokenizer, whose chat template may write thought tokens; else the base's."""
    source = args.base
    if args.adapter:
        with suppress(OSError):  # transformers raises it for a file missing on the Hub or, offline, in the cache
            cached_file(args.adapter, "tokenizer_config.json")
            source = args.adapter
    return AutoTokenizer.from_pretrained(source, padding_side="left")


def load_task(
    manager: TaskManager, name: str, answers: int, delimiters: Sequence[str] | None = None
) -> ConfigurableTask:
    """Load a task with its data. The first answer is scored, and votes over the first k answers.

    Args:
        manager: The harness's task manager.
        name: Name of the task.
        answers: Number of answers per question.
        delimiters: Two texts to write around the evaluated question, for adapters whose assistant reads what stands
            between them (`assistant_prompt_between`).
    """
    full = f"softcot_{name}"
    config = manager.load(full)["tasks"][full].config
    ways = config.filter_list
    extract, first = ways[0]["filter"]
    for count in sorted({k for k in VOTES if k < answers} | {answers} - {1}):
        vote = [{"function": "take_first_k", "k": count}, {"function": "custom", "filter_fn": answered}]
        ways.append({"name": f"vote of {count}", "filter": [extract, *vote, {"function": "majority_vote"}, first]})
    changes: dict[str, Any] = {"repeats": answers, "filter_list": ways}
    if delimiters is not None:
        before, after = (json.dumps(text, ensure_ascii=False) for text in delimiters)  # as Jinja literals
        changes["doc_to_text"] = config.doc_to_text.replace("{{question}}", f"{{{{ {before} ~ question ~ {after} }}}}")
        # few-shot examples have none, because each must occur once in a prompt
        changes["fewshot_config"] = {"doc_to_text": config.doc_to_text, "doc_to_target": "{{solution}}"}
    group = {"group": "evaluation", "task": [{"task": full, **changes}]}
    return manager.load(group)["tasks"][full]


def batch_size_for(questions: int, size: int, processes: int) -> int:
    """Return the largest batch size up to `size` for which no batch of any process has a single question.

    Raises:
        ValueError: If there is none.
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


class StopTexts(StoppingCriteria):
    """Stops each row at its stop text. The harness's own criteria only stop when all rows have one.

    Args:
        criteria: The harness's criteria, one per stop text.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        self.criteria = criteria

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return which rows are finished, `(B,)`."""
        self.criteria(input_ids, scores, **kwargs)
        return torch.tensor([text.done_tracker for text in self.criteria], device=input_ids.device).any(0)


class Harness(HFLM):
    """The harness's model, with finished sequences dropped from the batch, and several chains."""

    chains: tuple[int, ...] | None = None  # that answer the repeats of each request in turn; `None`: no choice
    answers = ""  # file of the answers of an interrupted evaluation, for chains

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer the requests, with several chains the repeats of each one by the chains in turn.

        The harness repeats a request without a difference, and keeps one greedy answer for all repeats. Here the chain
        is one of the settings by which it forms batches and looks up answers, so each chain has its own.
        """
        if self.chains is None:
            return super().generate_until(requests, disable_tqdm)
        repeats: Counter[int] = Counter()
        chosen = []
        for request in requests:
            prompt, settings = request.args
            chain = self.chains[repeats[id(request)] % len(self.chains)]
            repeats[id(request)] += 1
            chosen.append(replace(request, arguments=(prompt, settings | {"chains": chain})))
        chains, self.chains = self.chains, None
        try:
            return CachingLM(self, f"{self.answers}_rank{self.rank}.db").generate_until(chosen)
        finally:
            self.chains = chains

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> torch.Tensor:
        # Private; the part of the original (lm-eval 0.4.13) that `Evaluation.score` needs.
        if not settings["do_sample"]:
            settings.pop("temperature", None)  # 0, for which `generate` warns
        texts = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], len(context))
        with LiveRows(self.model, [StopTexts(texts)]) as live:
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([live]),
                pad_token_id=self.tokenizer.pad_token_id,
                **settings,
            )


class Evaluation:
    """A base in the harness, optionally with an adapter, and its loaded tasks.

    Args:
        args: Arguments of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = load_tokenizer(args)
        # Skip the harness's own tasks, some ten thousand files.
        self.manager = TaskManager(
            include_path=str(TASKS), include_defaults=False, metadata={"data_dir": args.data_dir}
        )
        self.harness: Any = self.in_vllm() if args.engine == "vllm" else self.in_transformers()
        self.method, self.delimiters = "SoftCoT", None
        self.number = self.set_number() if args.adapter else 0
        self.chains = self.choose_chains() if args.adapter else None
        # Without a chat template, a base continues with another question, as in its few-shot examples.
        self.until = ["\n\n"] if args.num_fewshot and self.tokenizer.chat_template is None else []
        load = partial(load_task, self.manager, delimiters=self.delimiters)
        self.task: Callable[[str, int], ConfigurableTask] = lru_cache(2)(load)

    def in_transformers(self) -> Harness:
        """Load the base and the adapter with transformers and PEFT."""
        return Harness(
            pretrained=self.args.base,
            peft=self.args.adapter,
            tokenizer=self.tokenizer,
            batch_size=self.args.batch_size,
            dtype="bfloat16" if self.args.bf16 else "float32",
            device="cuda" if torch.cuda.is_available() else "cpu",
        )

    def in_vllm(self) -> Engine:
        """Load the base and the adapter with vLLM."""
        args = self.args
        dtype = "bfloat16" if args.bf16 else "float32"
        return Engine(args.base, args.adapter, self.tokenizer, dtype, args.batch_size)

    def set_number(self) -> int:
        """Set and return the number of thoughts; 0 for an adapter of another method. Also set `delimiters`.

        Raises:
            ValueError: If options change thoughts, but the adapter has none.
        """
        args, config = self.args, self.config
        if not isinstance(config, SoftCoTConfig):
            self.method = str(config.peft_type.value)
            if args.controls or args.inference_thoughts or args.chains:
                raise ValueError(
                    f"`--controls`, `--inference-thoughts` and `--chains` change thoughts, but {args.adapter!r} is an "
                    f"adapter of the method {self.method}. Omit these options."
                )
            return 0
        self.delimiters = config.assistant_prompt_between
        config.inference_num_thought_tokens = args.inference_thoughts or config.inference_num_thought_tokens
        return config.inference_num_thought_tokens or config.num_thought_tokens

    @property
    def config(self) -> PeftConfig:
        """The adapter's config: the loaded model's, whose number of thoughts can be changed; vLLM has its own."""
        if self.args.engine == "vllm":
            return PeftConfig.from_pretrained(self.args.adapter)
        found: PeftConfig = self.harness.model.peft_config[self.harness.model.active_adapter]
        return found

    def choose_chains(self) -> tuple[int, ...] | None:
        """Return the chains that answer, by default all; `None` for an adapter without several chains.

        Raises:
            ValueError: If the adapter does not have a chain of the command line.
        """
        number = self.config.num_chains if isinstance(self.config, SoftCoTConfig) else 1
        chosen = tuple(self.args.chains or range(number))
        if max(chosen) >= number:
            raise ValueError(
                f"`--chains` must be below {number}, the number of chains of {self.args.adapter!r}, got {max(chosen)}."
            )
        return chosen if number > 1 else None

    def asked(self, task: ConfigurableTask) -> int:
        """Return the number of evaluated questions of a task."""
        return min(len(task.eval_docs), self.args.limit or len(task.eval_docs))

    def mean(self, task: ConfigurableTask, chain: int) -> torch.Tensor:
        """Return the thoughts of a chain, averaged over the first questions of a task, `(N, H_base)`."""
        prompts = [task.doc_to_text(doc) for doc in task.eval_docs.select(range(min(64, len(task.eval_docs))))]
        if self.tokenizer.chat_template is not None:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = [self.harness.apply_chat_template(turn) for turn in turns]
        special = self.tokenizer.chat_template is None  # a chat template writes special tokens itself
        return mean_thoughts(self.harness.model, self.tokenizer, prompts, chain=chain, add_special_tokens=special)

    def score(self, question: Question, folder: Path) -> dict[str, Any] | None:
        """Compute one score; return `None` in all processes but the first.

        Args:
            question: The score to compute.
            folder: Folder of the harness's logs, and of the answers of an interrupted evaluation.
        """
        args, harness, task = self.args, self.harness, self.task(question.task, question.answers)
        harness.batch_size_per_gpu = args.batch_size
        if question.control == "other_question":
            harness.batch_size_per_gpu = batch_size_for(self.asked(task), args.batch_size, harness.world_size)
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
        decoding = sampling if args.temperature > 0 else {"do_sample": False}
        # Without this, a saved template would also write thought tokens for the base.
        harness.chat_template_args = {"num_thought_tokens": 0 if question.control == "none" else self.number}
        mean = self.mean(task, question.chains[0]) if question.control == "mean" else None
        answers = str(folder / "answers")
        harness.chains = question.chains if self.chains and question.control != "none" else None
        harness.answers = answers
        tracker = EvaluationTracker(output_path=str(folder / "logs"))
        change: Any = nullcontext()
        if args.engine == "vllm":
            harness.adapter = None if question.control == "none" or not args.adapter else ADAPTER
            harness.seed = question.seed << 32  # far from the next seed's requests
        elif args.adapter:
            change = with_thoughts(harness.model, question.control, mean, question.seed)
        with change:
            found = simple_evaluate(
                model=harness,
                tasks=[task],
                task_manager=self.manager,
                num_fewshot=args.num_fewshot,
                limit=args.limit,
                apply_chat_template=self.tokenizer.chat_template is not None,
                gen_kwargs={**decoding, "max_gen_toks": args.max_new_tokens, "until": self.until},
                use_cache=answers if harness.chains is None else None,
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
        """Return which answers are correct, by filter, and the mean length of the answers in tokens."""
        right: dict[str, list[int]] = {}
        for sample in sorted(logged, key=lambda sample: sample["doc_id"]):
            right.setdefault(sample["filter"], []).append(int(sample["exact_match"]))
        texts = [text for sample in logged if sample["filter"] == "first" for text in sample["resps"][0]]
        lengths = [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        return {"right": right, "tokens": sum(lengths) / len(lengths)}
