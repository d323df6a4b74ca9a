r"""Train a SoftCoT adapter on GSM8K, save it, compare it with the plain base, and reload it.

With a pair and data from the Hub:

    python examples/train_gsm8k.py --base Qwen/Qwen2.5-7B-Instruct --assistant Qwen/Qwen2.5-1.5B-Instruct

The defaults are those of the study of real models (docs/real-models.md): 8 thoughts, 60 steps of 8 rows at a peak
rate of 1e-3 with 10 % warm-up and linear decay, greedy decoding, and *own rationales*: the base answers the first
1,536 training questions, one sample each at temperature 0.7, and trains on its right answers (`--no-own-rationales`:
on the data set's). The last rows of the training file are held out; the weights with the lowest validation loss are
kept. The recipe of the SoftCoT paper (arXiv 2502.12134) is in `examples/recipes/`.

Thoughts are placed at the end of the prompt; `--where user_turn --thought-token "<|endoftext|>"` places them at the
end of the user turn, after a sentence that introduces them and between markers, as in the paper. The assistant reads
the question alone, and its own turn begins with a lead-in (docs/prompts.md). `@examples/recipes/qwen2.5-7b.txt` reads
options from a file, with one option and its value per line and comments after `#`; later options override earlier
ones, and an empty text, "", leaves a part of the prompts out. Base and assistant may be folders
(`make_tiny_pair.py` creates a pair to try), and data may be JSON Lines files of
`{"question": "...", "answer": "... #### 72"}`. To use several GPUs, run the script with `accelerate launch` and DDP.
The evaluation distributes rows unevenly, which sharding engines do not allow. `--cache-thoughts` runs the assistant
once over the training prompts before training, instead of in every epoch. `--controls` shows how much of a score
depends on the content of the thoughts; `evaluate.py` evaluates other tasks.
"""

from __future__ import annotations

import json
import shlex
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, release_memory
from loss_plot import save_loss_plot
from peft import PeftModel, get_peft_model
from precision import avoid_cudnn_attention, has_fast_bfloat16
from problems import DELIMITERS, Example, Row, encode_example, encode_prompt, is_correct, load_rows
from rationales import own_rationales
from sources import check_source
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteriaList,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from softcot_peft import SoftCoTConfig, compute_thoughts, use_thoughts, with_thought_tokens
from softcot_peft.analysis import CONTROLS, with_thoughts
from softcot_peft.live_rows import LiveRows

INTRODUCTION = "A smaller model has read the question too. This is what it thinks of it, in a form that you can read:"
ASSISTANT_PROMPT = (
    "A larger model has to answer this question. Note for it in {num_thought_tokens} tokens what matters."
    "\n\n{prompt}\n"
)
ASSISTANT_PREFIX = "Here is what matters, in {num_thought_tokens} tokens:"
NO_THINKING = "{%- set enable_thinking = enable_thinking | default(false) -%}"  # at the start of a chat template
EMPTY_THINK_BLOCK = "<think>\n\n</think>\n\n"  # what Qwen3's chat template then writes
QUESTIONS, STEPS = 1536, 60  # of the study: questions that the base answers for own rationales, and training steps


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse the command line. The defaults are the study's; `examples/recipes/` has the paper's recipe."""
    parser = ArgumentParser(description="Train and evaluate a SoftCoT adapter on GSM8K.", fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)  # type: ignore[method-assign]
    add = parser.add_argument
    add("--base", required=True, help="Hub id or folder of the base")
    add("--assistant", required=True, help="Hub id or folder of the assistant")
    add("--train-file", default="openai/gsm8k", help="JSON Lines file, or a data set on the Hub (split 'train')")
    add("--eval-file", default="openai/gsm8k", help="JSON Lines file, or a data set on the Hub (split 'test')")
    add("--output-dir", default="runs/gsm8k", help="folder of the adapter and its checkpoints")
    add("--keep-calculator-marks", action="store_true", help="train on answers with annotations such as <<48/2=24>>")
    own = "train on the base's own right answers instead of the data set's"
    add("--own-rationales", action=BooleanOptionalAction, default=True, help=own)
    add("--rationale-samples", type=int, default=1, help="own answers per question")
    add("--rationale-temperature", type=float, default=0.7, help="of own answers")
    add("--num-thoughts", type=int, default=8, help="N in training")
    add("--inference-thoughts", type=int, default=8, help="N in evaluation")
    add("--where", choices=["prompt_end", "user_turn", "generation_prompt"], default="prompt_end")
    add(
        "--thought-token",
        help="token of the base's vocabulary that marks thought positions, unless --where is prompt_end",
    )
    add("--introduction", default=INTRODUCTION, help="sentence before the thoughts, with --where user_turn")
    add("--begin-marker", default="", help="token before the thoughts, unless --where is prompt_end")
    add("--end-marker", default="", help="token after the thoughts, unless --where is prompt_end")
    add("--assistant-prompt", default=ASSISTANT_PROMPT, help="what the assistant reads; '' for its input alone")
    add("--assistant-prefix", default=ASSISTANT_PREFIX, help="lead-in of the assistant's own turn; '' for none")
    add("--assistant-reads", choices=["question", "prompt"], default="question", help="{prompt} of --assistant-prompt")
    add("--assistant-thought-token", help="token at the assistant's thought positions; default: UNK, EOS or padding")
    add("--no-thinking", action="store_true", help="Qwen3: begin the turns of both models with an empty think block")
    add("--learning-rate", type=float, default=1e-3, help="peak rate")
    add("--warmup", type=float, default=0.1, help="share of the steps in which the rate rises; 1 or more: steps")
    add("--schedule", choices=["linear", "cosine", "constant_with_warmup"], default="linear", help="after the warm-up")
    add("--epochs", type=float)
    add("--max-steps", type=int, help=f"overrides --epochs; {STEPS} if neither is set")
    add("--batch-size", type=int, default=8, help="training rows per device")
    add("--group-by-length", action=BooleanOptionalAction, default=True, help="batches of rows of similar length")
    add(
        "--max-length",
        type=int,
        default=1024,
        help="longer training rows are dropped, so that every row keeps its EOS",
    )
    add("--max-train-samples", type=int, help=f"training questions; default: all, with own rationales {QUESTIONS}")
    add("--validation-samples", type=int, default=64, help="rows held out of the end of --train-file; 0 for none")
    add("--patience", type=int, help="stop after this many validations without a lower loss; a run has ten")
    add("--max-eval-samples", type=int)
    add("--eval-batch-size", type=int, default=16)
    add("--max-new-tokens", type=int, default=1024)
    add("--temperature", type=float, default=0.0, help="0 is greedy; the paper samples at 1, with the seeds 41 to 45")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=41)
    bf16 = has_fast_bfloat16()
    add("--bf16", action=BooleanOptionalAction, default=bf16, help="default: on GPUs and CPUs with bfloat16 units")
    add("--cache-thoughts", action="store_true", help="train on precomputed thoughts; 1 to 3 GB in --output-dir")
    add("--resume", action="store_true", help="continue from the last checkpoint in --output-dir")
    add("--controls", action="store_true", help="also evaluate with changed thoughts; see softcot_peft.analysis")
    args = parser.parse_args(argv)
    check_source("--base", args.base)
    check_source("--assistant", args.assistant)
    if args.patience is not None and not args.validation_samples:
        raise ValueError("`--patience` needs a validation loss: set `--validation-samples` to at least 1.")
    if args.max_steps is None:
        args.max_steps = STEPS if args.epochs is None else -1
    if args.max_train_samples is None and args.own_rationales:
        args.max_train_samples = QUESTIONS
    return args


def make_config(args: Namespace) -> SoftCoTConfig:
    """Return the adapter's config."""
    if args.where == "prompt_end" and (args.begin_marker or args.end_marker):
        raise ValueError("`--begin-marker` and `--end-marker` need thought tokens: set `--where user_turn`.")
    prefix = (EMPTY_THINK_BLOCK if args.no_thinking else "") + args.assistant_prefix
    return SoftCoTConfig(
        task_type="CAUSAL_LM",
        assistant_model_name_or_path=args.assistant,
        assistant_prompt=args.assistant_prompt or None,
        assistant_prefix=prefix or None,
        assistant_prompt_between=list(DELIMITERS) if args.assistant_reads == "question" else None,
        assistant_thought_token=args.assistant_thought_token,
        assistant_dtype="bfloat16" if args.bf16 else "float32",
        num_thought_tokens=args.num_thoughts,
        inference_num_thought_tokens=args.inference_thoughts,
        thought_token=args.thought_token,
        placement="prompt_end" if args.where == "prompt_end" else "thought_token",
    )


def split_rows(args: Namespace) -> dict[str, list[Row]]:
    """Load the training file, whose last rows are for validation."""
    rows = load_rows(args.train_file, "train")
    end = len(rows) - args.validation_samples
    if not 0 < end <= len(rows):
        raise ValueError(
            f"`--validation-samples` must be at least 0 and leave some of the {len(rows)} rows for training, got "
            f"{args.validation_samples}."
        )
    return {"validation": rows[end:], "training": rows[:end][: args.max_train_samples]}


def encode_rows(part: str, rows: list[Row], tokenizer: Tokenizer, args: Namespace) -> list[Example]:
    """Encode training or validation rows. Rows that are too long are dropped, not truncated."""
    encoded = [encode_example(tokenizer, row, args.num_thoughts, args.keep_calculator_marks) for row in rows]
    kept = [row for row in encoded if len(row["input_ids"]) <= args.max_length]
    PartialState().print(f"{part.capitalize()} rows: {len(kept)}; dropped, too long: {len(rows) - len(kept)}")
    if rows and not kept:
        raise ValueError(f"`--max-length` must leave some {part} rows, but {args.max_length} drops all {len(rows)}.")
    return kept


def load_tokenizer(args: Namespace, config: SoftCoTConfig) -> Tokenizer:
    """Load the base's tokenizer. It writes the thought tokens, except for `--where prompt_end`."""
    tokenizer = AutoTokenizer.from_pretrained(args.base, padding_side="left")
    if tokenizer.eos_token is None:
        raise ValueError(f"`--base` must have a tokenizer with an EOS token, but {args.base!r} has none.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # labels and masks follow lengths, so EOS is still trained
    if args.no_thinking and tokenizer.chat_template is not None:
        tokenizer.chat_template = NO_THINKING + tokenizer.chat_template
    if args.where == "prompt_end":
        return tokenizer
    introduction = f"\n\n{args.introduction}\n" if args.introduction and args.where == "user_turn" else ""
    return with_thought_tokens(tokenizer, config, args.where, introduction + args.begin_marker, args.end_marker)


def load_base(args: Namespace, tokenizer: Tokenizer) -> PreTrainedModel:
    """Load the base, with the decoding options of the command line instead of its own."""
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    own = base.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    decoding = sampling if args.temperature > 0 else {"do_sample": False}
    # `generate` would complete a config passed to it with values of the base's own, such as penalties.
    base.generation_config = GenerationConfig(
        max_new_tokens=args.max_new_tokens, eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id, **decoding
    )
    return base


class SameBatches(TrainerCallback):
    """Draws the batches of an epoch from its number, so that a resumed run continues with those that are left."""

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **others: Any) -> None:
        """Seed the generator that `Trainer` groups rows of similar length with."""
        torch.manual_seed(args.seed + int(state.epoch or 0))


def training_options(args: Namespace) -> TrainingArguments:
    """Return the options of `Trainer`. With validation rows, it keeps the weights with the lowest validation loss."""
    watching = {"eval_strategy": "steps", "eval_steps": 0.1, "load_best_model_at_end": True}
    return TrainingArguments(
        output_dir=args.output_dir,
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup,
        lr_scheduler_type=args.schedule,
        num_train_epochs=args.epochs or 1,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        train_sampling_strategy="group_by_length" if args.group_by_length else "random",
        bf16=args.bf16,
        use_cpu=not torch.accelerator.is_available(),  # required for bf16
        logging_steps=0.05,  # of all steps
        save_strategy="steps",
        save_steps=0.1,
        save_total_limit=2,  # the best and the last
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=args.seed,
        **(watching if args.validation_samples else {}),
    )


def train(model: PeftModel, tokenizer: Tokenizer, args: Namespace) -> Trainer:
    """Train with the plain `Trainer`, and save the final weights, the tokenizer and a plot of the losses."""
    options, parts = training_options(args), split_rows(args)
    checkpoint = last_whole_checkpoint(args.output_dir) if args.resume else None
    if args.own_rationales:
        model.to(options.device)
        parts = {part: own_rationales(part, found, model, tokenizer, args, solve_all) for part, found in parts.items()}
    validation, rows = (encode_rows(part, found, tokenizer, args) for part, found in parts.items())
    collator, callbacks = DataCollatorForSeq2Seq(tokenizer), [SameBatches()]
    if args.patience is not None:
        callbacks.append(EarlyStoppingCallback(args.patience))
    trainer = Trainer(
        model,
        options,
        collator,
        train_dataset=rows,
        eval_dataset=validation or None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if args.cache_thoughts:
        cache_thoughts(model, rows + validation, args)
    before = training_loss(model, collator, rows[:64])
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    after = training_loss(model, collator, rows[:64])
    trainer.accelerator.print(f"Loss on the same training rows: {before:.3f} at the start, {after:.3f} at the end")
    use_thoughts(model, None)
    if trainer.is_world_process_zero():
        save_loss_plot(trainer.state.log_history, Path(args.output_dir, "loss.png"))
    return trainer


def cache_thoughts(model: PeftModel, rows: list[Example], args: Namespace) -> None:
    """Compute the thoughts of all rows on the model's device, or reuse those of an earlier run or process."""
    from datasets import Dataset
    from datasets.fingerprint import Hasher

    compute = compute_thoughts(model)
    file = Path(args.output_dir, "thoughts", f"{Hasher.hash((rows, compute))}.arrow")
    file.parent.mkdir(parents=True, exist_ok=True)
    options = {"batched": True, "batch_size": 16, "cache_file_name": str(file)}
    with PartialState().local_main_process_first():
        thoughts = Dataset.from_list(rows).map(compute, desc="thoughts", **options)
    use_thoughts(model, thoughts)


def last_whole_checkpoint(folder: str | Path) -> str:
    """Return the last complete checkpoint. `Trainer` itself takes the last one, and fails if it is incomplete."""
    paths = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(paths, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        with suppress(OSError, json.JSONDecodeError):
            json.loads((path / "trainer_state.json").read_bytes())  # the file that `Trainer` writes last
            return str(path)
    raise ValueError(f"`--resume` needs a complete checkpoint in `--output-dir`, but {str(folder)!r} has none.")


@torch.no_grad()
def training_loss(model: PeftModel, collator: DataCollatorForSeq2Seq, rows: list[Example]) -> float:
    """Return the mean loss of some rows, with the number of thoughts in training."""
    model.train()
    return sum(model(**collator([row]).to(model.device)).loss.item() for row in rows) / len(rows)


def solve(
    model: PeftModel,
    tokenizer: Tokenizer,
    rows: list[Row],
    num_thoughts: int,
    seed: int,
    whole: bool = False,
    **decoding: Any,
) -> list[str]:
    """Generate the solutions of one batch of problems; with `whole`, a solution that was cut is an empty text."""
    prompts = [{"input_ids": encode_prompt(tokenizer, row["question"], num_thoughts)} for row in rows]
    batch = DataCollatorForSeq2Seq(tokenizer)(prompts).to(model.device)  # padded on the left
    torch.manual_seed(seed)
    with LiveRows(model) as live:
        ids = model.eval().generate(**batch, stopping_criteria=StoppingCriteriaList([live]), **decoding)
    new = ids[:, batch["input_ids"].shape[1] :]
    solutions = tokenizer.batch_decode(new, skip_special_tokens=True)
    stops = new.new_tensor(model.get_base_model().generation_config.eos_token_id)
    ended = torch.isin(new, stops).any(1).tolist()
    return [text if end or not whole else "" for text, end in zip(solutions, ended, strict=True)]


def solve_all(
    name: str,
    model: PeftModel,
    tokenizer: Tokenizer,
    rows: list[Row],
    num_thoughts: int,
    args: Namespace,
    **options: Any,
) -> list[str]:
    """Solve all problems, with batches distributed over the processes; every process gets all solutions."""
    state, size = PartialState(), args.eval_batch_size
    starts = range(size * state.process_index, len(rows), size * state.num_processes)
    found: list[tuple[int, list[str]]] = []
    for start in tqdm(starts, desc=name, unit="batch", disable=not state.is_main_process):
        batch = rows[start : start + size]
        found += [(start, solve(model, tokenizer, batch, num_thoughts, args.seed + start, **options))]
    return [text for _, batch in sorted(gather_object(found)) for text in batch]


def evaluate(
    name: str, model: PeftModel, tokenizer: Tokenizer, rows: list[Row], num_thoughts: int, args: Namespace
) -> list[str]:
    """Solve all problems, and print the exact match."""
    solutions = solve_all(name, model, tokenizer, rows, num_thoughts, args)
    right = sum(is_correct(text, row["answer"]) for text, row in zip(solutions, rows, strict=True))
    PartialState().print(f"Exact match, {name}: {right / len(rows):.2%} ({right} of {len(rows)})")
    return solutions


def check_saved(args: Namespace, tokenizer: Tokenizer, rows: list[Row], solutions: list[str]) -> None:
    """Load the saved adapter into a newly loaded base, and compare its solutions of one batch."""
    model = PeftModel.from_pretrained(load_base(args, tokenizer), args.output_dir).to(PartialState().device)
    same = sum(map(str.__eq__, solve(model, tokenizer, rows, args.inference_thoughts, args.seed), solutions))
    print(f"Reloaded adapter: {same} of {len(rows)} solutions of the first batch are the same")
    if same < len(rows):
        raise RuntimeError(f"The adapter in {args.output_dir!r} does not solve problems as the trained one did.")


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and reload."""
    args = parse_args(argv)
    set_seed(args.seed)
    avoid_cudnn_attention()
    config = make_config(args)
    tokenizer = load_tokenizer(args, config)
    rows = load_rows(args.eval_file, "test", args.max_eval_samples)
    rows.sort(key=lambda row: len(row["question"]), reverse=True)  # batches of similar length, the longest first
    if args.controls and 1 in (args.eval_batch_size, len(rows) % args.eval_batch_size):
        raise ValueError(
            f"`--controls` gives a problem the thoughts of another one in its batch, but {len(rows)} problems in "
            f"batches of {args.eval_batch_size} leave one alone. Choose another `--eval-batch-size`."
        )
    model = get_peft_model(load_base(args, tokenizer), config)
    train(model, tokenizer, args)
    with model.disable_adapter():
        evaluate("base", model, tokenizer, rows, 0, args)
    solutions = evaluate("SoftCoT", model, tokenizer, rows, args.inference_thoughts, args)
    for control in ("zero", "other_question", "random_projection") if args.controls else ():
        with with_thoughts(model, control, seed=args.seed):
            evaluate(CONTROLS[control], model, tokenizer, rows, args.inference_thoughts, args)
    del model
    release_memory()  # room for the second base
    if PartialState().is_main_process:
        check_saved(args, tokenizer, rows[: args.eval_batch_size], solutions[: args.eval_batch_size])


if __name__ == "__main__":
    main()
