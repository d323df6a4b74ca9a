"""Train a SoftCoT adapter on the small pair, offline, and use it in every way. Takes half a minute on 2 cores.

The base works out `12+34*5` but cannot read `twelve plus thirty four times five`. The assistant can read it but cannot
work it out. The adapter adds only a linear layer between them. `small_pair.py` describes how the pair is trained.

    python examples/quickstart.py [--steps 300] [--output-dir runs/quickstart]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors import safe_open
from small_pair import load_or_make, problems
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from softcot_peft import SoftCoTConfig
from softcot_peft.analysis import CONTROLS, with_thoughts

HERE = Path(__file__).parent
Model = PreTrainedModel | PeftModel


@torch.no_grad()
def answer(model: Model, tokenizer: PreTrainedTokenizerBase, prompts: list[str], what: str) -> list[str]:
    """Generate greedy answers in batches of 100."""
    answers = []
    for start in tqdm(range(0, len(prompts), 100), desc=f"answering, {what}", leave=False):
        batch = tokenizer(prompts[start : start + 100], return_tensors="pt", padding=True)
        output = model.generate(**batch, max_new_tokens=32, do_sample=False)
        answers += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def share_right(answers: list[str], examples: list[dict[str, str]]) -> float:
    """Return the share of answers that match exactly."""
    return sum(a == example["response"] for a, example in zip(answers, examples, strict=True)) / len(examples)


def tokenize(tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, str]]) -> list[dict[str, list[int]]]:
    """Return ids of prompt, response and EOS, with labels on response and EOS. Thoughts are inserted automatically."""
    rows = []
    for example in tqdm(examples, desc="tokenizing", leave=False):
        prompt = tokenizer(example["prompt"])["input_ids"]
        response = [*tokenizer(example["response"])["input_ids"], tokenizer.eos_token_id]
        ids = prompt + response
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + response})
    return rows


def train(model: PeftModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> None:
    """Train the projection with the plain Trainer."""
    rows = tokenize(tokenizer, problems(args.steps * args.batch_size, seed=args.seed))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output_dir / "checkpoints"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="linear",
            weight_decay=0.0,
            logging_steps=max(args.steps // 8, 1),
            save_strategy="no",
            report_to=[],
            seed=args.seed,
            use_cpu=True,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    trainer.train()


def reload(folder: Path, base: Path) -> dict[str, Model]:
    """Load the adapter through three routes, each with a newly loaded base."""
    transformers_model = AutoModelForCausalLM.from_pretrained(base)
    transformers_model.load_adapter(str(folder))
    return {
        "PeftModel.from_pretrained": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
        "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM.from_pretrained(folder),
        "base.load_adapter": transformers_model,
    }


def check(holds: bool, what: str) -> None:
    """Print that a check passed, or exit."""
    print(f"{'yes' if holds else 'NO '}  {what}")
    if not holds:
        raise SystemExit(f"quickstart: check failed: {what}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-2)
    parser.add_argument("--num-thought-tokens", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=400, help="number of held-out problems of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pair", type=Path, default=HERE / "pair", help="folder of the pair; created if missing")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, compare, save, reload and generate."""
    args, began = parse(argv), time.monotonic()
    set_seed(args.seed)
    base_folder, assistant_folder = load_or_make(args.pair)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    worded = problems(args.held_out, seed=3, held_out=True)
    digits = problems(args.held_out, seed=4, kind="digits", held_out=True)
    worded_prompts, digit_prompts = ([example["prompt"] for example in kind] for kind in (worded, digits))
    before = answer(base, tokenizer, worded_prompts, "base, worded")
    own = answer(base, tokenizer, digit_prompts, "base, its own problems")

    config = SoftCoTConfig(
        task_type="CAUSAL_LM",
        assistant_model_name_or_path=str(assistant_folder),
        num_thought_tokens=args.num_thought_tokens,
    )
    model: Any = get_peft_model(base, config)
    model.print_trainable_parameters()
    train(model, tokenizer, args)
    model.eval()
    after = answer(model, tokenizer, worded_prompts, "SoftCoT, worded")
    changed = {}
    for control in ("zero", "other_question"):
        with with_thoughts(model, control):
            changed[CONTROLS[control]] = answer(model, tokenizer, worded_prompts, CONTROLS[control])
    with model.disable_adapter():
        own_after = answer(model, tokenizer, digit_prompts, "adapter disabled")

    folder = args.output_dir / "adapter"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    with safe_open(file, "pt") as tensors:
        tensor_bytes = sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118  # no dict

    print(f"\n{worded[0]['prompt']}  ->  {after[0].strip()}    (base alone: {before[0].strip()!r})\n")
    print(f"| accuracy on {args.held_out} held-out problems each | number words | base's own, in digits |")
    print("| --- | --- | --- |")
    for system, words, numbers in (("base alone", before, own), ("SoftCoT (disabled for digits)", after, own_after)):
        print(f"| {system} | {share_right(words, worded):.1%} | {share_right(numbers, digits):.1%} |")
    for label, words in changed.items():
        print(f"| control: {label} in place of the thoughts | {share_right(words, worded):.1%} | |")
    print()
    check(own_after == own, "adapter disabled: the answers to the base's own problems are unchanged")
    check(
        file.stat().st_size <= tensor_bytes + 4096,
        f"adapter file: {file.stat().st_size} bytes, of which {tensor_bytes} are tensors",
    )
    for route, reloaded in reload(folder, base_folder).items():
        check(
            answer(reloaded, tokenizer, worded_prompts, route) == after, f"{route}: the same {args.held_out} answers"
        )
    pipe = pipeline("text-generation", model=AutoModelForCausalLM.from_pretrained(base_folder), tokenizer=tokenizer)
    pipe.model.load_adapter(str(folder))
    (told,) = pipe(worded[0]["prompt"], max_new_tokens=32, do_sample=False, return_full_text=False)
    check(told["generated_text"] == after[0], f"pipeline: {told['generated_text'].strip()}")
    print(f"\nSaved the adapter in {folder}. Total time: {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    main()
