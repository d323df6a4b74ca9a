"""Runs one job, from its definition to JSON-compatible results. Jobs find earlier ones in the store."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import set_seed

from softcot_peft import use_thoughts
from softcot_peft.analysis import (
    attention_to_thoughts,
    collect_thoughts,
    thought_norms,
    thought_similarity,
    with_thoughts,
)

from . import data, probing, tasks, training
from .jobs import Diagnosis, Evaluation, Job, Probe, Spread, Training, Writing
from .made import (
    SEEN,
    Setting,
    average,
    blinded,
    build,
    examples,
    keep,
    load,
    seen,
    system_of,
    training_rows,
    weights_file,
)
from .systems import Models, RealSoftCoT, RealZeroShot, softcot, unused_token

Result = dict[str, Any]
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}


def perform(job: Job, setting: Setting) -> Result:
    """Run a job, and add its seconds, the state of the code, the libraries and the device to the result."""
    began = time.monotonic()
    kinds = {
        Writing: write,
        Training: train,
        Evaluation: evaluate,
        Diagnosis: diagnose,
        Probe: probe,
        Spread: spread,
    }
    result: Result = kinds[type(job)](job, setting)  # type: ignore[operator]
    gc.collect()
    torch.cuda.empty_cache()  # other processes use the same device
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    libraries = {name: version(name) for name in ("torch", "transformers", "peft")}
    made = {"code": setting.code, "libraries": libraries, "device": device}
    return result | {"seconds": time.monotonic() - began} | made


def scored(task: str, asked: Sequence[tasks.Row], texts: Sequence[str], copies: int) -> Result:
    """Return the extracted answers and which are right, by question and sample."""
    found = [
        [tasks.extracted(task, row, text) for text in texts[place * copies : (place + 1) * copies]]
        for place, row in enumerate(asked)
    ]
    right = [[int(answer == row["answer"]) for answer in each] for each, row in zip(found, asked, strict=True)]
    wanted = [row["answer"] for row in asked]
    return {"finals": found, "wanted": wanted, "right": [each[0] for each in right], "all_right": right}


# Rationales


def write(job: Writing, setting: Setting) -> Result:
    """Sample one answer to each question of a stretch of the training part; keep the texts of the right ones."""
    system = RealZeroShot(Models(setting.models[job.base], "", setting.dtype, setting.max_new_tokens, setting.batch))
    asked = data.split("gsm8k", "training", setting.data_dir)[job.first : job.first + job.count]
    rows = examples("gsm8k", asked, system)
    set_seed(job.seed + job.first)
    texts = system.answer([row["prompt"] for row in rows], **SAMPLING)
    right = scored("gsm8k", asked, texts, 1)["right"]
    kept = [
        {"question": row["question"], "text": text.strip()}
        for row, text, good in zip(asked, texts, right, strict=True)
        if good
    ]
    return {"kept": kept, "asked": len(asked), "tokens": system.generated_tokens / len(asked)}


# Training


def train(job: Training, setting: Setting) -> Result:
    """Train a system, save its weights, and return its losses on the validation part."""
    system = build(job, setting)
    rows = examples("gsm8k", training_rows(job, setting), system)
    checked = examples("gsm8k", data.split("gsm8k", "validation", setting.data_dir)[: job.validated], system)
    given = blinded([*rows, *checked], system) if job.blind else [*rows, *checked]
    encoded = system.rows(given)
    trained, tested = encoded[: len(rows)], encoded[len(rows) :]
    lengths = [len(row["question"]) + len(row["solution"]) for row in rows]
    steps = training.order(lengths, job.steps, job.batch, job.seed)
    if isinstance(system, RealSoftCoT) and job.chain_init != "trained":  # else, what is read changes with each step
        training.precompute(system, encoded, system.rows([*rows, *checked]) if job.blind else None)
    before = training.loss(system, tested)
    began = time.monotonic()
    history = training.learn(system, trained, steps, job)
    training_seconds = time.monotonic() - began
    mean = (
        average(system, [row["prompt"] for row in given[: min(SEEN, len(rows))]])
        if isinstance(system, RealSoftCoT)
        else None
    )
    found = training.losses(system, tested, mean)
    if isinstance(system, RealSoftCoT):
        use_thoughts(system.model, None)
    keep(system, weights_file(job, setting))
    return {
        "history": history,
        "before": before,
        "losses": found,
        "rows": len(rows),
        "trained_parameters": system.trained_parameters,
        "training_seconds": training_seconds,
    }


# Evaluation


def evaluate(job: Evaluation, setting: Setting) -> Result:
    """Answer the first questions of a split."""
    system = system_of(job, setting)
    asked = data.split(job.task, job.split, setting.data_dir)[: job.count]
    prompts = [row["prompt"] for row in examples(job.task, asked, system)]
    decoding = SAMPLING | {"num_return_sequences": job.samples} if job.samples > 1 else {}
    mean = None
    if job.inference_thoughts:
        system.model.peft_config["default"].inference_num_thought_tokens = job.inference_thoughts
    if job.control == "mean":
        mean = average(system, [row["prompt"] for row in seen(system, setting)])
    set_seed(job.training.seed if job.training else 0)
    if job.control == "own":
        texts = system.answer(prompts, **decoding)
    else:
        with with_thoughts(system.model, job.control, mean):
            texts = system.answer(prompts, **decoding)
    result = scored(job.task, asked, texts, job.samples)
    tokens = system.generated_tokens / len(texts)
    return result | {"tokens": tokens, "ids": [data.digest(row["question"])[:12] for row in asked], "shown": texts[:3]}


# Diagnosis and probe


def diagnose(job: Diagnosis, setting: Setting) -> Result:
    """Describe the thoughts, and compare the answers with the adapter disabled with the base's own."""
    asked = data.split("gsm8k", "validation", setting.data_dir)[: job.count]
    system = load(job.training, setting, marked=True)
    rows = examples("gsm8k", asked, system)
    prompts = [row["prompt"] for row in rows]
    options = {"padding_side": "left", "add_special_tokens": system.tokenizer.chat_template is None}
    thoughts = collect_thoughts(system.model, system.tokenizer, prompts, batch_size=16, **options)
    alone = RealZeroShot(setting.pair(job.training.pair)).answer(prompts)
    with system.model.disable_adapter():
        disabled = system.answer(prompts)
    system.model.get_base_model().set_attn_implementation("eager")
    mark = system.tokenizer.convert_tokens_to_ids(unused_token(system.tokenizer))
    shares = []
    for row in rows[:8]:
        prompt, response = system.rows([row])[0]
        ids = torch.tensor([[*prompt, *[mark] * job.training.thoughts, *response]], device=system.model.device)
        shares.append(attention_to_thoughts(system.model, ids, mark).mean(1))
    position = torch.nn.functional.normalize(thoughts.float().mean(0), dim=-1)  # (N, H)
    return {
        "norms": thought_norms(system.model, thoughts),
        "similarity": thought_similarity(thoughts).tolist(),
        "between_positions": float((position @ position.T).mean()),
        "attention": torch.stack(shares).mean(0).tolist(),
        "same_when_disabled": [int(a == b) for a, b in zip(disabled, alone, strict=True)],
    }


def probe(job: Probe, setting: Setting) -> Result:
    """Read questions with the assistant, and predict the answers from its states."""
    system = softcot(setting.pair(job.pair), Training(pair=job.pair, thoughts=job.thoughts))
    asked = data.split(job.task, "test", setting.data_dir)[: job.count]
    rows = system.rows(examples(job.task, asked, system))
    states = probing.states(system, rows)
    return probing.probe(states, [row["answer"] for row in asked])


def spread(job: Spread, setting: Setting) -> Result:
    """Read questions of the validation part, and describe how far the states differ."""
    training = Training(pair=job.pair, thoughts=job.thoughts, thought_source=job.thought_source)
    system = softcot(setting.pair(job.pair), training)
    asked = data.split("gsm8k", "validation", setting.data_dir)[: job.count]
    states = probing.states(system, system.rows(examples("gsm8k", asked, system)))
    return probing.spread(states.unflatten(1, (job.thoughts, -1)))
