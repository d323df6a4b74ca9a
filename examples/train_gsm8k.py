r"""Train a SoftCoT adapter on GSM8K, measure it against its plain base, save it and load it again.

With a pair and the data from the Hub, in the paper's recipe (arXiv 2502.12134):

    python examples/train_gsm8k.py --base Qwen/Qwen2.5-7B-Instruct --assistant Qwen/Qwen2.5-1.5B-Instruct \
        --train-file openai/gsm8k --eval-file openai/gsm8k --output-dir runs/gsm8k

With the thoughts where the paper has them, at the end of the user's turn instead of the prompt's end, add

        --where user_turn --thought-token "<|endoftext|>"

Base and assistant may be folders, and the data JSON-lines files of `{"question": ..., "answer": "... #### 72"}`.
`make_tiny_pair.py` makes such a pair in a minute or two. On several GPUs: `accelerate launch examples/train_gsm8k.py ...`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, release_memory
from peft import PeftModel, get_peft_model
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from softcot_peft import SoftCoTConfig, with_thought_tokens

PROMPT = (
    "Here is a word problem. Reason about it one step per line, then close with a line of the form '#### N', where N is "
    "the number that answers it.\n\nProblem: {question}"
)
ASSISTANT_PROMPT = (
    "A larger model is about to solve the task below. In {num_thought_tokens} tokens, note what it should pay attention "
    "to.\n\n{prompt}"
)
# A minus sign is one only where nothing stands before it that it could be subtracted from.
NUMBER = re.compile(r"((?:(?<![\w).%])[-−])?\$?-?)((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")

Row = dict[str, str]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; the defaults are the paper's recipe."""
    parser = argparse.ArgumentParser(description="Train and evaluate a SoftCoT adapter on GSM8K.")
    add = parser.add_argument
    add("--base", required=True, help="Hub id or folder of the base")
    add("--assistant", required=True, help="Hub id or folder of the assistant")
    add("--train-file", required=True, help="JSON-lines file, or data set on the Hub (its split 'train')")
    add("--eval-file", required=True, help="JSON-lines file, or data set on the Hub (its split 'test')")
    add("--output-dir", required=True, help="folder of the adapter and of its checkpoints")
    add("--data-config", default="main", help="configuration of a data set on the Hub")
    add("--keep-calculator-marks", action="store_true", help="leave <<48/2=24>> in the answers")
    add("--num-thoughts", type=int, default=32, help="N in training")
    add("--inference-thoughts", type=int, default=4, help="N in evaluation")
    add("--where", choices=["prompt_end", "user_turn", "generation_prompt"], default="prompt_end")
    add("--thought-token", help="token of the base's vocabulary; needed unless thoughts stand at the prompt's end")
    add("--assistant-prompt", default=ASSISTANT_PROMPT, help="what the assistant reads; '' for the prompt itself")
    add("--learning-rate", type=float, default=2e-5)
    add("--epochs", type=float, default=10)
    add("--max-steps", type=int, default=-1, help="training steps, instead of epochs")
    add("--batch-size", type=int, default=4, help="training rows per device")
    add("--max-length", type=int, default=1024, help="longer training rows are dropped; none is cut before its EOS")
    add("--max-train-samples", type=int)
    add("--max-eval-samples", type=int)
    add("--eval-batch-size", type=int, default=16)
    add("--max-new-tokens", type=int, default=1024)
    add("--temperature", type=float, default=0.0, help="0 is greedy; the paper samples at 1 with seeds 41 to 45")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=41)
    add("--bf16", action=argparse.BooleanOptionalAction, help="default: where CUDA supports it")
    add("--resume", action="store_true", help="continue from the last checkpoint in --output-dir")
    args = parser.parse_args(argv)
    if args.bf16 is None:
        args.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return args


def load_rows(source: str, split: str, data_config: str = "main", limit: int | None = None) -> list[Row]:
    """Read problems from a JSON-lines file, or from a split of a data set on the Hub."""
    if Path(source).is_file():
        lines = Path(source).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()][:limit]
    from datasets import load_dataset

    return list(load_dataset(source, data_config, split=split))[:limit]


def final_number(text: str) -> Decimal | None:
    """The number a solution ends in: the first one after its last `####`, else the last one; `None` without any."""
    _, mark, ending = text.rpartition("####")
    numbers = NUMBER.findall(ending)
    if not numbers:
        return None
    sign, digits = numbers[0 if mark else -1]
    value = Decimal(digits.replace(",", ""))
    return -value if sign.strip("$") else value


def is_correct(solution: str, reference: str) -> bool:
    """Exact match of the final numbers, as numbers: `$1,234.00` is `1234`."""
    number = final_number(solution)
    return number is not None and number == final_number(reference)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str, num_thoughts: int) -> list[int]:
    """Ids of a prompt up to where the response begins: with the generation prompt, where there is a chat template.

    Args:
        tokenizer: The base's.
        question: The problem.
        num_thoughts: Thought tokens that a template of `with_thought_tokens` writes; others write none.
    """
    text = PROMPT.format(question=question)
    if tokenizer.chat_template is None:
        return tokenizer(text + "\n\nSolution:\n")["input_ids"]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        tokenize=False,
        add_generation_prompt=True,
        num_thought_tokens=num_thoughts,
    )
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]  # the template writes BOS itself


def encode_example(
    tokenizer: PreTrainedTokenizerBase, row: Row, num_thoughts: int = 0, keep_marks: bool = False
) -> dict[str, list[int]]:
    """A training row: prompt, answer and EOS, with the answer and its EOS as labels."""
    prompt = encode_prompt(tokenizer, row["question"], num_thoughts)
    answer = row["answer"] if keep_marks else re.sub(r"<<.*?>>", "", row["answer"])
    response = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}


def encode_training_rows(
    tokenizer: PreTrainedTokenizerBase, rows: list[Row], args: argparse.Namespace
) -> list[dict[str, list[int]]]:
    """Encode the training rows and drop those that are too long, so that every one keeps its EOS."""
    encoded = [encode_example(tokenizer, row, args.num_thoughts, args.keep_calculator_marks) for row in rows]
    kept = [row for row in encoded if len(row["input_ids"]) <= args.max_length]
    PartialState().print(f"Training rows: {len(kept)}; longer than {args.max_length} tokens: {len(rows) - len(kept)}")
    if not kept:
        raise ValueError(f"`--max-length` must leave training rows, got {args.max_length}, which drops all {len(rows)}.")
    return kept


def load_tokenizer(args: argparse.Namespace, config: SoftCoTConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer, which writes the thought tokens unless they stand at the prompt's end."""
    tokenizer = AutoTokenizer.from_pretrained(args.base, padding_side="left")
    if tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer of `--base` must have an EOS token, got none at {args.base!r}.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks and labels are made from lengths, so EOS stays EOS
    return tokenizer if args.where == "prompt_end" else with_thought_tokens(tokenizer, config, args.where)


def load_base(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The base, with the decoding options of the command line in place of the ones it came with."""
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    own = base.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0} if args.temperature > 0 else {}
    # Replaced, not passed to `generate`, which would fill gaps from the old one: greedy means no penalties either.
    base.generation_config = GenerationConfig(
        do_sample=args.temperature > 0,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=sorted(stops),
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    return base


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    """The recipe, in the Trainer's words; the last epoch's weights are kept."""
    return TrainingArguments(
        output_dir=args.output_dir,
        learning_rate=args.learning_rate,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        bf16=args.bf16,
        logging_steps=0.05,  # of all steps
        save_strategy="epoch",
        save_total_limit=1,
        report_to="none",
        seed=args.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def by_length(prompts: list[list[int]], size: int) -> list[list[int]]:
    """Batches of indices, the longest prompts first, so that rows of a batch need little padding."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    return [order[first : first + size] for first in range(0, len(order), size)]


@torch.inference_mode()
def solve(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], seed: int
) -> list[str]:
    """Solutions for one batch of prompts, padded on the left."""
    batch = DataCollatorWithPadding(tokenizer)([{"input_ids": ids} for ids in prompts]).to(model.device)
    torch.manual_seed(seed)
    ids = model.generate(**batch)[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def solve_all(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    args: argparse.Namespace,
    name: str,
) -> list[str]:
    """Solutions for all prompts, the batches shared out between the processes."""
    state = PartialState()
    batches = list(enumerate(by_length(prompts, args.eval_batch_size)))[state.process_index :: state.num_processes]
    found: list[tuple[int, str]] = []
    for number, batch in tqdm(batches, desc=name, unit="batch", disable=not state.is_main_process):
        texts = solve(model, tokenizer, [prompts[index] for index in batch], args.seed + number)
        found += zip(batch, texts, strict=True)
    solutions = dict(gather_object(found))
    return [solutions[index] for index in range(len(prompts))]


def check_reloaded(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], solutions: list[str]
) -> None:
    """Load the saved adapter into a base loaded anew, and compare its solutions of the first batch."""
    model = PeftModel.from_pretrained(load_base(args, tokenizer), args.output_dir).to(PartialState().device).eval()
    batch = by_length(prompts, args.eval_batch_size)[0]
    again = solve(model, tokenizer, [prompts[index] for index in batch], args.seed)
    same = sum(text == solutions[index] for text, index in zip(again, batch, strict=True))
    print(f"Reloaded adapter: {same} of {len(batch)} solutions of the first batch are the same")
    if same != len(batch):
        raise RuntimeError(f"The adapter in {args.output_dir!r} does not reproduce the solutions of the trained one.")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, evaluate, reload."""
    args = parse_args(argv)
    trainer_args = training_arguments(args)
    set_seed(args.seed)
    config = SoftCoTConfig(
        task_type="CAUSAL_LM",
        assistant_model_name_or_path=args.assistant,
        assistant_prompt=args.assistant_prompt or None,
        assistant_dtype="bfloat16" if args.bf16 else "float32",
        num_thought_tokens=args.num_thoughts,
        inference_num_thought_tokens=args.inference_thoughts,
        thought_token=args.thought_token,
        placement="prompt_end" if args.where == "prompt_end" else "thought_token",
    )
    tokenizer = load_tokenizer(args, config)
    rows = load_rows(args.train_file, "train", args.data_config, args.max_train_samples)
    test = load_rows(args.eval_file, "test", args.data_config, args.max_eval_samples)

    model = get_peft_model(load_base(args, tokenizer), config)
    trainer = Trainer(
        model=model,
        args=trainer_args,
        train_dataset=encode_training_rows(tokenizer, rows, args),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()  # the adapter and the tokenizer
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.accelerator.print(f"Training loss: {losses[0]:.3f} at the start, {losses[-1]:.3f} at the end")

    model.eval()
    plain = [encode_prompt(tokenizer, row["question"], 0) for row in test]
    prompts = [encode_prompt(tokenizer, row["question"], args.inference_thoughts) for row in test]
    with model.disable_adapter():
        base_solutions = solve_all(model, tokenizer, plain, args, "base")
    solutions = solve_all(model, tokenizer, prompts, args, "SoftCoT")
    for name, found in (("base", base_solutions), ("SoftCoT", solutions)):
        right = sum(is_correct(text, row["answer"]) for text, row in zip(found, test, strict=True))
        trainer.accelerator.print(f"Exact match, {name}: {right / len(test):.2%} ({right} of {len(test)})")
    trainer, model = release_memory(trainer, model)
    if PartialState().is_main_process:
        check_reloaded(args, tokenizer, prompts, solutions)


if __name__ == "__main__":
    main()
