r"""Measure an adapter in vLLM and transformers for `docs/serving-performance.md`; `make bench-serving` calls it.

    python -m benchmarks.serving [--base NAME --assistant NAME] [--data-dir FOLDER] [--at-once 1 4 16 32]

One server has the base and an adapter, and both answer questions of GSM8K in turn, with the same number of clients.
The same model then answers in batches of as many with `generate` of transformers, while the server is idle. Answers
have the same number of tokens everywhere, and no system gets a question twice, so that no answer comes from the prefix
cache. The projection has not been trained, which changes what is answered, but not how long it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from precision import has_fast_bfloat16
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from evaluation import data
from softcot_peft import SoftCoTConfig
from softcot_peft.serving import Embedder

from .machine import environment
from .server import LocalServer
from .serving_page import BASE, SOFTCOT, TRANSFORMERS, write

NAME, ADAPTER = "base", "softcot"  # in requests
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """One system's answers to the questions of one round."""

    system: str
    at_once: int
    requests: int
    tokens: int  # of all answers
    seconds: float
    first: list[float]  # seconds to the first token of each answer; empty where none is told


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description="Measure adapters in vLLM.")
    add = parser.add_argument
    add("--base", default="Qwen/Qwen2.5-Coder-0.5B-Instruct", help="Hub id or folder; default: %(default)s")
    add("--assistant", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or folder; default: %(default)s")
    add("--data-dir", help="folder with `gsm8k/train.jsonl`, instead of the Hub")
    add("--at-once", type=int, nargs="+", default=[1, 4, 16, 32], help="numbers of clients, and sizes of batches")
    add("--thoughts", type=int, default=32, help="N")
    add("--new-tokens", type=int, default=128, help="tokens of an answer")
    add("--repeats", type=int, default=3, help="rounds for each number of clients")
    add("--rounds-of", type=int, default=2, help="questions of a round, for each client")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if has_fast_bfloat16() else "float32")
    add("--server-options", default="", help="added to the server's command line")
    add("--docs", type=Path, default=ROOT / "docs", help="folder of serving-performance.md")
    args = parser.parse_args(argv)
    for name in ("thoughts", "new_tokens", "repeats", "rounds_of"):
        if getattr(args, name) < 1:
            parser.error(f"`--{name.replace('_', '-')}` must be at least 1, got {getattr(args, name)}.")
    return args


def chat(question: str) -> list[dict[str, str]]:
    """Return the conversation of a question."""
    return [{"role": "user", "content": question}]


def ask(server: LocalServer, model: str, question: str, new: int) -> tuple[int, float]:
    """Return the number of new tokens and the seconds to the first one.

    Raises:
        RuntimeError: The answer has another length.
    """
    body = {"model": model, "messages": chat(question), "max_tokens": new, "temperature": 0, "ignore_eos": True}
    began, first, usage = perf_counter(), None, {}
    for event in server.events("/v1/chat/completions", body):
        if first is None and any(choice["delta"].get("content") for choice in event["choices"]):
            first = perf_counter() - began
        usage = event.get("usage") or usage
    if first is None or usage.get("completion_tokens") != new:
        raise RuntimeError(f"An answer must have {new} tokens, got {usage}.")
    return new, first


def through_server(server: LocalServer, system: str, questions: Sequence[str], at_once: int, new: int) -> Run:
    """Ask the server, with a number of requests at once."""
    model = {BASE: NAME, SOFTCOT: ADAPTER}[system]
    began = perf_counter()
    with ThreadPoolExecutor(at_once) as clients:
        answers = list(clients.map(lambda question: ask(server, model, question, new), questions))
    seconds = perf_counter() - began
    tokens, first = zip(*answers, strict=True)
    return Run(system, at_once, len(questions), sum(tokens), seconds, list(first))


def in_batches(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], at_once: int, new: int
) -> Run:
    """Answer in batches with `generate`."""
    began = perf_counter()
    for start in range(0, len(questions), at_once):
        turns = [chat(question) for question in questions[start : start + at_once]]
        batch = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
        model.generate(**batch, do_sample=False, min_new_tokens=new, max_new_tokens=new)
    return Run(TRANSFORMERS, at_once, len(questions), new * len(questions), perf_counter() - began, [])


def reading(embedder: Embedder, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[float]:
    """Return the seconds in which assistant and projection read each prompt alone, with nothing else running."""
    times = []
    for question in questions:
        ids = tokenizer.apply_chat_template(chat(question), add_generation_prompt=True, return_dict=True)["input_ids"]
        began = perf_counter()
        embedder(torch.tensor([ids]))
        times.append(perf_counter() - began)
    return times


def sizes(model: PeftModel, tokenizer: PreTrainedTokenizerBase, args: Any) -> dict[str, float]:
    """Return what multiplications depend on: weights of layers and head, and the mean length of a prompt."""

    def layers(network: torch.nn.Module) -> int:
        linear = (module for module in network.modules() if isinstance(module, torch.nn.Linear))
        return sum(module.weight.numel() for module in linear)

    base: Any = model.get_base_model()
    head = base.get_output_embeddings().weight.numel()
    assistant = AutoModel.from_pretrained(args.assistant)
    asked = islice(data.gsm8k(args.data_dir)["train"]["question"], 64)
    lengths = [len(tokenizer.apply_chat_template(chat(each), add_generation_prompt=True).input_ids) for each in asked]
    return {
        "layers": layers(base.get_decoder()),
        "head": head,
        "assistant": layers(assistant),
        "prompt": mean(lengths),
    }


def make_adapter(args: argparse.Namespace, folder: Path) -> PeftModel:
    """Load the base, attach a new adapter, and save it."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=getattr(torch, args.dtype))
    config = SoftCoTConfig(
        task_type="CAUSAL_LM", assistant_model_name_or_path=args.assistant, num_thought_tokens=args.thoughts
    )
    model = get_peft_model(base, config).eval()
    model.save_pretrained(folder)
    return model


def command(args: argparse.Namespace) -> list[str]:
    """Return the server's command line."""
    found = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.base, "--dtype", args.dtype]
    found += ["--served-model-name", NAME, "--enable-prompt-embeds", "--max-model-len", "1024"]
    return [*found, "--max-num-seqs", str(max(args.at_once)), *shlex.split(args.server_options)]


def measure(server: LocalServer, model: PeftModel, embedder: Embedder, args: argparse.Namespace) -> dict[str, Any]:
    """Run all systems in turn, and return what was measured."""
    tokenizer = AutoTokenizer.from_pretrained(args.base, padding_side="left")
    questions: Iterator[str] = iter(data.gsm8k(args.data_dir)["train"]["question"])
    warm = list(islice(questions, 2))
    systems: dict[str, Callable[[Sequence[str], int], Run]] = {
        BASE: lambda asked, at_once: through_server(server, BASE, asked, at_once, args.new_tokens),
        SOFTCOT: lambda asked, at_once: through_server(server, SOFTCOT, asked, at_once, args.new_tokens),
        TRANSFORMERS: lambda asked, at_once: in_batches(model, tokenizer, asked, at_once, args.new_tokens),
    }
    for run in systems.values():
        run(warm, 2)
    read = reading(embedder, tokenizer, warm + list(islice(questions, 16)))[len(warm) :]
    runs = []
    rounds = [(at_once, number) for at_once in args.at_once for number in range(args.repeats)]
    for at_once, number in tqdm(rounds, desc="rounds"):
        asked = list(islice(questions, at_once * args.rounds_of))
        order = list(systems) if number % 2 == 0 else list(reversed(systems))
        runs += [asdict(systems[name](asked, at_once)) for name in order]
    return {"runs": runs, "reading": read, "sizes": sizes(model, tokenizer, args)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, then write the page."""
    args = parse_args(argv)
    ran = environment(torch.cuda.is_available())
    with tempfile.TemporaryDirectory() as scratch:
        adapter, log = Path(scratch) / "adapter", Path(scratch) / "log"
        model = make_adapter(args, adapter)
        embedder = Embedder.from_pretrained(adapter, args.base, dtype=getattr(torch, args.dtype))
        variables = {"VLLM_PLUGINS": "softcot", "SOFTCOT_ADAPTERS": f"{ADAPTER}={adapter}", "VLLM_NO_USAGE_STATS": "1"}
        variables["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; on CPUs alone
        with LocalServer(command(args), log, variables) as server:
            found = measure(server, model, embedder, args)
    settings = {name: value for name, value in vars(args).items() if name != "docs"}
    results = {"settings": settings, "environment": ran, **found}
    for name in ("base", "assistant"):  # not the folders of this machine
        results["settings"][name] = Path(settings[name]).name if Path(settings[name]).is_dir() else settings[name]
    results["settings"]["data_dir"] = None
    args.docs.mkdir(parents=True, exist_ok=True)
    file = args.docs / "serving-performance.json"
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write(args.docs)
    print(f"Wrote {args.docs / 'serving-performance.md'}; median reading alone: {median(found['reading']):.3f} s.")


if __name__ == "__main__":
    main()
