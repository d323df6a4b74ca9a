"""Train an adapter on the small pair and write the figures of docs/looking.md. Takes a minute on 2 cores.

python examples/look.py [--steps 150] [--docs docs]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import quickstart
from peft import get_peft_model
from results.figures import save
from small_pair import load_or_make, problems
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from softcot_peft import SoftCoTConfig
from softcot_peft.analysis import (
    attention_to_thoughts,
    collect_thoughts,
    nearest_tokens,
    plot_attention,
    plot_nearest_tokens,
    plot_similarity,
    thought_similarity,
)

HERE = Path(__file__).parent
NUM_THOUGHTS, QUESTIONS = 8, 8


def train(pair: Path, steps: int) -> tuple[Any, Any]:
    """Return a model with a trained adapter, and its tokenizer."""
    set_seed(0)
    base_folder, assistant_folder = load_or_make(pair)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    config = SoftCoTConfig(
        task_type="CAUSAL_LM",
        assistant_model_name_or_path=str(assistant_folder),
        num_thought_tokens=NUM_THOUGHTS,
        thought_token="<thought>",  # noqa: S106
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config)
    with tempfile.TemporaryDirectory() as folder:
        quickstart.train(model, tokenizer, quickstart.parse(["--steps", str(steps), "--output-dir", folder]))
    return model.eval(), tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and draw what the thoughts of held-out problems look like."""
    parser = argparse.ArgumentParser(description="Write the figures of docs/looking.md.")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="folder of looking.md and its figures")
    parser.add_argument("--pair", type=Path, default=HERE / "pair", help="folder of the pair; created if missing")
    args = parser.parse_args(argv)
    model, tokenizer = train(args.pair, args.steps)
    examples = problems(QUESTIONS, seed=3, held_out=True)
    prompts = [example["prompt"] for example in examples]
    answers = quickstart.answer(model, tokenizer, prompts, "what the figures show")
    thoughts = collect_thoughts(model, tokenizer, prompts)
    nearest = nearest_tokens(model, tokenizer, thoughts, similarities=True)
    similarity = thought_similarity(thoughts)
    model.get_base_model().set_attn_implementation("eager")
    text = prompts[0] + "<thought>" * NUM_THOUGHTS + examples[0]["response"]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    shares = attention_to_thoughts(model, ids, tokenizer.convert_tokens_to_ids("<thought>"))
    tokens = tokenizer.convert_ids_to_tokens(ids[0, -shares.shape[-1] :])
    folder = args.docs / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    save(lambda figure: plot_nearest_tokens(nearest, None, ax=figure.subplots()), folder / "looking-nearest", (7, 3))
    save(lambda figure: plot_similarity(similarity, ax=figure.subplots()), folder / "looking-similarity", (4.8, 4))
    save(lambda figure: plot_attention(shares, tokens, ax=figure.subplots()), folder / "looking-attention", (8, 2.4))
    print(f"Wrote {folder}/looking-*.png. The questions and their answers:")
    for number, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        print(number, example["prompt"], answer.strip(), "right" if answer == example["response"] else "wrong")


if __name__ == "__main__":
    main()
