"""Runs one job, from its definition to JSON-compatible results. Independent of other jobs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from baselines import AssistCoT, Baseline, Coconut, CotUnk, Lora, PromptTuning, SoftCoT, TrainedPlaceholders, ZeroShot
from small_pair import KINDS, MARK, load_or_make_assistant, load_or_make_base, problems, share_solved
from transformers import set_seed

from softcot_peft import with_thought_tokens
from softcot_peft.analysis import (
    CONTROLS,
    attention_to_thoughts,
    collect_thoughts,
    mean_thoughts,
    nearest_tokens,
    thought_norms,
    thought_similarity,
    with_thoughts,
)

from .jobs import NUMBERS, Job, Making, Run
from .variants import VARIANTS

Result = dict[str, Any]
Examples = list[dict[str, str]]
THOUGHT = "<thought>"
# In a chat the marker is the generation prompt, so the end of the user turn and of the prompt are different places.
CHAT = (
    "{% for turn in messages %}{{ turn['content'] }}{% endfor %}{% if add_generation_prompt %}" + MARK + "{% endif %}"
)
SAMPLES = 10
VOTES_OF_CHAINS = 8  # sampled answers to a problem, from all chains together; a multiple of every K


@dataclass(frozen=True)
class Sizes:
    """Size of the experiments; tests use smaller ones."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 600
    batch: int = 16
    asked: int = 400  # held-out problems
    sampled: int = 200  # of these, each sampled `SAMPLES` times at temperature 1
    seen: int = 40  # of these, whose thoughts are analyzed
    base_steps: int = 3500
    assistant_steps: int = 1500


SMALL = Sizes(seeds=(0,), steps=2, batch=2, asked=4, sampled=3, seen=2, base_steps=40, assistant_steps=40)  # to try it


def perform(job: Job, sizes: Sizes, pair: Path, made: Path) -> Result:
    """Run a job.

    Args:
        job: The job.
        sizes: Size of the experiment.
        pair: Folder of the small pair.
        made: Folder of the models that jobs train, each in a subfolder with its job's name.
    """
    return make(job, sizes, made / job.name) if isinstance(job, Making) else run(job, sizes, pair, made)


def make(job: Making, sizes: Sizes, folder: Path) -> Result:
    """Train a model and evaluate it alone."""
    if job.what == "base":
        load_or_make_base(folder, hinted=0.0, steps=sizes.base_steps)
    else:
        load_or_make_assistant(folder, job.width, steps=sizes.assistant_steps)
    wanted = "response" if job.what == "base" else "expression"
    asked = {kind: problems(sizes.asked, seed=1, kind=kind, held_out=True) for kind in KINDS}
    return {"alone": {kind: share_solved(folder, examples, wanted) for kind, examples in asked.items()}}


def run(job: Run, sizes: Sizes, pair: Path, made: Path) -> Result:
    """Train a system and evaluate it."""
    system = build(job, pair, made)
    training = problems(sizes.steps * sizes.batch, job.seed, job.kind)
    own = problems(sizes.asked, 1000 + job.seed, job.kind, held_out=True)
    digits = problems(sizes.asked, 2000 + job.seed, "digits", held_out=True)
    if job.place:
        training, own, digits = (as_chats(examples, system, job) for examples in (training, own, digits))
    began = time.monotonic()
    system.fit(training, sizes.steps, job.seed)
    result: Result = {"seconds": time.monotonic() - began, "trained_parameters": system.trained_parameters}
    result["loss"] = system.loss(own)
    result["right"], result["tokens"] = ask(system, own)
    for what in job.asks:
        result[what] = ASKS[what](system, own, digits, sizes, job)
    return result


def build(job: Run, pair: Path, made: Path) -> Baseline:
    """Create the untrained system of a run."""
    base = pair / "base" if job.hinted else made / Making("base").name
    assistant = pair / "assistant" if job.width == 64 else made / Making("assistant", job.width).name
    number, rate = job.thoughts, {"learning_rate": job.learning_rate}
    fields = VARIANTS.get(job.variant, {})
    reader = None if fields.get("thought_source") == "base" else assistant
    marked = {"thought_token": THOUGHT, "placement": "thought_token"} if job.place == "user_turn" else {}
    builders = {
        "zero-shot": lambda: ZeroShot(base),
        "CoT-Unk": lambda: CotUnk(base, number),
        "Assist-CoT": lambda: AssistCoT(base, assistant, put=lambda prompt, hint: prompt + hint.removeprefix(MARK)),
        "prompt tuning": lambda: PromptTuning(base, number, **rate),
        "trained placeholders": lambda: TrainedPlaceholders(base, number, **rate),
        "LoRA": lambda: Lora(base, **rate),
        "Coconut": lambda: Coconut(base, stages=(2, 4, number), **rate),
        "SoftCoT": lambda: SoftCoT(base, reader, number, marked | fields, **rate),
    }
    return builders[job.system]()


def as_chats(examples: Examples, system: Baseline, job: Run) -> Examples:
    """Format each problem as a user turn, with the run of thought tokens at its end for `"user_turn"`."""
    tokenizer = system.tokenizer
    tokenizer.chat_template = CHAT
    if job.place == "user_turn":
        tokenizer = with_thought_tokens(tokenizer, system.config, "user_turn")
    turns = [[{"role": "user", "content": example["prompt"]}] for example in examples]
    prompts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return [
        example | {"prompt": prompt, "response": example["response"].removeprefix(MARK)}
        for example, prompt in zip(examples, prompts, strict=True)
    ]


def ask(system: Baseline, examples: Examples, **generation: Any) -> tuple[list[int], float]:
    """Return 1 or 0 for each answer (exact match), and the mean number of generated tokens per answer."""
    before = system.generated_tokens
    answers = system.answer([example["prompt"] for example in examples], **generation)
    right = [int(text == example["response"]) for text, example in zip(answers, examples, strict=True)]
    return right, (system.generated_tokens - before) / len(examples)


def on_digits(system: Baseline, own: Examples, digits: Examples, sizes: Sizes, job: Run) -> Result:
    """Evaluate the base's own task with the system, and for SoftCoT also with the adapter disabled."""
    found: Result = {"right": ask(system, digits)[0]}
    if isinstance(system, SoftCoT):
        prompts = [example["prompt"].replace(THOUGHT, "") for example in digits]
        before = ZeroShot(system.base).answer(prompts)
        with system.model.disable_adapter():
            after = system.answer(prompts)
        found["same_when_disabled"] = [int(a == b) for a, b in zip(after, before, strict=True)]
    return found


def samples(system: Baseline, own: Examples, digits: Examples, sizes: Sizes, job: Run) -> Result:
    """Return the final results of sampled answers, by problem and sample."""
    asked = own[: sizes.sampled]
    drawn = []
    for sample in range(SAMPLES):
        set_seed(SAMPLES * job.seed + sample)
        drawn.append(system.answer([item["prompt"] for item in asked], do_sample=True, temperature=1.0, top_k=0))
    return finals([*zip(*drawn, strict=True)], asked)


def finals(texts: Sequence[Sequence[str]], asked: Examples) -> Result:
    """Return the final results (the text after the last equals sign), by problem and answer, and the correct ones."""
    found = [[text.rpartition("=")[2] for text in drawn] for drawn in texts]
    return {"finals": found, "wanted": [item["response"].rpartition("=")[2] for item in asked]}


def chains(system: SoftCoT, own: Examples, digits: Examples, sizes: Sizes, job: Run) -> Result:
    """Return the final results of each chain's greedy answer, and those of samples that the chains draw in turn.

    Also the cosine similarity between the thoughts of two chains, averaged over pairs, questions and positions.
    """
    asked, number = own[: sizes.sampled], system.config.num_chains
    prompts, copies = [item["prompt"] for item in asked], VOTES_OF_CHAINS // number
    greedy = system.answer(prompts, chains=None)
    set_seed(job.seed)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": copies}
    drawn = system.answer(prompts, chains=None, **sampling)
    by_problem = [greedy[start : start + number] for start in range(0, len(greedy), number)]
    # By problem, chain and sample; chains take turns.
    starts = range(0, len(drawn), VOTES_OF_CHAINS)
    in_turn = [[drawn[start + copies * k + r] for r in range(copies) for k in range(number)] for start in starts]
    model, tokenizer, seen = system.model, system.tokenizer, prompts[: sizes.seen]
    thoughts = torch.stack([collect_thoughts(model, tokenizer, seen, chain=chain) for chain in range(number)])
    unit = torch.nn.functional.normalize(thoughts, dim=-1)  # (K, Q, N, H)
    pairs = torch.tril_indices(number, number, -1)
    alike = (unit[pairs[0]] * unit[pairs[1]]).sum(-1).mean()
    return {
        "greedy": finals(by_problem, asked),
        "sampled": finals(in_turn, asked),
        "similarity": float(alike) if number > 1 else None,
    }


def in_controls(system: SoftCoT, own: Examples, digits: Examples, sizes: Sizes, job: Run) -> Result:
    """Return which answers are correct with changed thoughts, by control."""
    prompts = [example["prompt"] for example in problems(sizes.sampled, job.seed, job.kind)]
    mean = mean_thoughts(system.model, system.tokenizer, prompts)
    right = {}
    for control in CONTROLS:
        with with_thoughts(system.model, control, mean, job.seed):
            right[control] = ask(system, own)[0]
    return right


def by_number(system: SoftCoT, own: Examples, digits: Examples, sizes: Sizes, job: Run) -> Result:
    """Return which answers are correct for each number of thoughts at inference."""
    config = system.model.peft_config["default"]
    right = {}
    for number in NUMBERS:
        config.inference_num_thought_tokens = number
        right[str(number)] = ask(system, own)[0]
    config.inference_num_thought_tokens = None
    return right


def diagnostics(system: SoftCoT, own: Examples, digits: Examples, sizes: Sizes, job: Run) -> Result:
    """Compute statistics of the thoughts: similarity across questions, norms, nearest tokens."""
    model, tokenizer, seen = system.model, system.tokenizer, own[: sizes.seen]
    thoughts = collect_thoughts(model, tokenizer, [item["prompt"] for item in seen])
    ranked = nearest_tokens(model, tokenizer, thoughts, count=1)
    nearest = [[tokens[0] for tokens in question] for question in ranked]
    return {
        "similarity": thought_similarity(thoughts).tolist(),
        "norms": thought_norms(model, thoughts),
        "questions": [item["prompt"] for item in seen],
        "nearest": nearest,
        "wanted": [list(item["expression"]) for item in seen],
    }


def first_characters(system: SoftCoT, own: Examples, digits: Examples, sizes: Sizes, job: Run) -> list[list[int]]:
    """Return which of the first five characters of each answer (the problem up to its second number) are correct."""
    answers = system.answer([item["prompt"] for item in own])
    return [
        [int(text[place : place + 1] == item["response"][place]) for place in range(5)]
        for text, item in zip(answers, own, strict=True)
    ]


def attention(system: SoftCoT, own: Examples, digits: Examples, sizes: Sizes, job: Run) -> Result:
    """Return the attention of each token after the thoughts to the thoughts, by layer; mean over questions."""
    system.model.get_base_model().set_attn_implementation("eager")
    tokenizer = system.tokenizer
    run_id = tokenizer.convert_tokens_to_ids(THOUGHT)
    paid = []
    for item in own[: sizes.seen]:
        ids = tokenizer(item["prompt"] + item["response"], return_tensors="pt")["input_ids"]
        paid.append(attention_to_thoughts(system.model, ids, run_id))
    system.model.get_base_model().set_attn_implementation("sdpa")
    return {"tokens": tokenizer.tokenize(MARK + own[0]["response"]), "share": torch.stack(paid).mean(0).tolist()}


ASKS = {
    "digits": on_digits,
    "samples": samples,
    "chains": chains,
    "controls": in_controls,
    "numbers": by_number,
    "diagnostics": diagnostics,
    "characters": first_characters,
    "attention": attention,
}
