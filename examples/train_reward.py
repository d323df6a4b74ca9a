"""Train a SoftCoT adapter on rewards instead of answers, with TRL's GRPOTrainer, offline on the small pair.

The adapter starts poor, from a few supervised steps (`--warm-up-steps`), so that sampling finds some right results.
GRPO samples `--group-size` solutions of each problem and rewards a right result with 1, anything else with 0. The
script prints the mean reward of greedy solutions of held-out problems before and after, next to controls. The page
`docs/reward.md` explains the settings and has the scores of three seeds.

    python examples/train_reward.py [--steps 100] [--seed 0] [--output-dir runs/reward]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from quickstart import HERE, answer, train
from small_pair import load_or_make, problems
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from softcot_peft import SoftCoTConfig
from softcot_peft.analysis import CONTROLS, with_thoughts


def result_of(text: str) -> str:
    """Return the final result of a solution such as `12+34=046;046*5=0230`; empty if there is none."""
    return text.rpartition("=")[2].strip() if "=" in text else ""


def reward(completions: list[str], response: list[str], **columns: Any) -> list[float]:
    """Reward a right result with 1, anything else with 0. TRL passes the columns of the data by name."""
    return [float(result_of(text) == result_of(right)) for text, right in zip(completions, response, strict=True)]


def grpo(model: PeftModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> None:
    """Train the projection on the reward alone; the responses in the data only check results."""
    from datasets import Dataset  # not needed to evaluate
    from trl import GRPOConfig, GRPOTrainer

    rows = problems(args.steps * args.prompts, seed=args.seed + 1000)
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(args.output_dir / "checkpoints"),
            max_steps=args.steps,
            per_device_train_batch_size=args.prompts * args.group_size,
            num_generations=args.group_size,
            max_completion_length=24,
            temperature=args.temperature,
            learning_rate=args.learning_rate,
            lr_scheduler_type="linear",
            beta=args.beta,
            gradient_checkpointing=False,  # two-pass training needs it off, and stores little
            bf16=False,
            use_cpu=True,
            logging_steps=max(args.steps // 10, 1),
            save_strategy="no",
            report_to=[],
            seed=args.seed,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()


def mean_reward(model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], what: str) -> float:
    """Return the mean reward of greedy answers."""
    answers = answer(model, tokenizer, [row["prompt"] for row in rows], what)
    return sum(reward(answers, [row["response"] for row in rows])) / len(rows)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=100, help="GRPO steps")
    add("--prompts", type=int, default=16, help="problems per step")
    add("--group-size", type=int, default=8, help="sampled solutions per problem")
    add("--learning-rate", type=float, default=1e-2)
    add("--temperature", type=float, default=1.0)
    add("--beta", type=float, default=0.0, help="weight of the KL term against the adapter at the start")
    add("--warm-up-steps", type=int, default=10, help="supervised steps before GRPO; 0 starts from a fresh adapter")
    add("--warm-up-learning-rate", type=float, default=2e-2)
    add("--num-thought-tokens", type=int, default=8)
    add("--held-out", type=int, default=200, help="number of held-out problems")
    add("--seed", type=int, default=0)
    add("--pair", type=Path, default=HERE / "pair", help="folder of the pair; created if missing")
    add("--output-dir", type=Path, default=Path("runs/reward"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and compare."""
    args = parse(argv)
    set_seed(args.seed)
    base, assistant = load_or_make(args.pair)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = SoftCoTConfig(
        task_type="CAUSAL_LM",
        assistant_model_name_or_path=str(assistant),
        num_thought_tokens=args.num_thought_tokens,
    )
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    held_out = problems(args.held_out, seed=3, held_out=True)
    if args.warm_up_steps:
        warm_up = {"steps": args.warm_up_steps, "learning_rate": args.warm_up_learning_rate, "batch_size": 16}
        train(model, tokenizer, argparse.Namespace(**vars(args) | warm_up))
    table = {"SoftCoT, before": mean_reward(model.eval(), tokenizer, held_out, "before")}
    grpo(model, tokenizer, args)
    table["SoftCoT, after"] = mean_reward(model.eval(), tokenizer, held_out, "after")
    for control in ("none", "zero", "other_question"):
        with with_thoughts(model, control):
            table[f"control: {CONTROLS[control]}"] = mean_reward(model, tokenizer, held_out, CONTROLS[control])
    model.save_pretrained(args.output_dir / "adapter")
    tokenizer.save_pretrained(args.output_dir / "adapter")
    print(f"\n| seed {args.seed} | mean reward on {args.held_out} held-out problems |")
    print("| --- | --- |")
    for system, value in table.items():
        print(f"| {system} | {value:.3f} |")


if __name__ == "__main__":
    main()
