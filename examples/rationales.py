"""Rationales of the base's own: its right answers to questions, kept in a file for later runs.

Rationales of a data set also teach their style, which may cost accuracy by itself; the base's own do not.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from blocks import write_whole
from peft import PeftModel
from problems import Row, encode_prompt, is_correct
from transformers import PreTrainedTokenizerBase as Tokenizer

from softcot_peft.sources.fingerprint import model_fingerprint

Solve = Callable[..., list[str]]  # `solve_all` of train_gsm8k.py


def own_rationales(
    part: str, rows: Sequence[Row], model: PeftModel, tokenizer: Tokenizer, args: Namespace, solve_all: Solve
) -> list[Row]:
    """Return the rows that the base solves, with its own right answers. Every process must call it.

    The answers are sampled with the adapter disabled. A later run with the same base, prompts and options reads them
    from `args.output_dir`, whose `rationales/*.jsonl` can also be a `--train-file`.

    Raises:
        ValueError: No answer is right.
    """
    if not rows:
        return []
    state, asked = PartialState(), len(rows) * args.rationale_samples
    file = rationales_file(rows, model, tokenizer, args)
    # The main process decides, so that either all processes sample or none does.
    stored = [file.read_text(encoding="utf-8") if state.is_main_process and file.is_file() else None]
    text = broadcast_object_list(stored)[0]
    if text is not None:
        kept = [json.loads(line) for line in text.splitlines()]
    else:
        kept = right_answers(part, rows, model, tokenizer, args, solve_all)
        if kept and state.is_main_process:
            write_whole(file, "".join(json.dumps(row) + "\n" for row in kept))
    state.print(
        f"Own rationales, {part}: {len(kept)} of {asked} answers are right and different ({len(kept) / asked:.0%}), "
        f"for {len({row['question'] for row in kept})} of {len(rows)} questions"
        + ("" if text is None else f"; read from {file}")
    )
    if not kept:
        more = "`--max-train-samples`" if part == "training" else "`--validation-samples`; 0 for no validation"
        raise ValueError(
            f"`--own-rationales` needs right answers of the base, but none of {asked} to the {part} questions is. Let "
            f"it give more answers (`--rationale-samples`), to more questions ({more}), or longer ones "
            "(`--max-new-tokens`); or set `--no-own-rationales`."
        )
    return kept


def rationales_file(rows: Sequence[Row], model: PeftModel, tokenizer: Tokenizer, args: Namespace) -> Path:
    """Return the file of the rationales, named by what they depend on."""
    from datasets.fingerprint import Hasher

    base = model.get_base_model()
    prompts = [encode_prompt(tokenizer, row["question"]) for row in rows]
    sampling = (args.rationale_samples, args.rationale_temperature, args.max_new_tokens, args.seed)
    stops = base.generation_config.eos_token_id
    key = Hasher.hash((list(rows), prompts, model_fingerprint(base), sampling, stops))
    return Path(args.output_dir, "rationales", f"{key}.jsonl")


def right_answers(
    part: str, rows: Sequence[Row], model: PeftModel, tokenizer: Tokenizer, args: Namespace, solve_all: Solve
) -> list[Row]:
    """Sample answers, and return the right ones in the order of the rows, equal ones once."""
    places = [place for place in range(len(rows)) for _ in range(args.rationale_samples)]
    places.sort(key=lambda place: len(rows[place]["question"]), reverse=True)  # batches of similar length
    asked = [rows[place] for place in places]
    sampling = {"do_sample": True, "temperature": args.rationale_temperature, "top_p": 1.0, "top_k": 0}
    with model.disable_adapter():
        texts = solve_all(f"own rationales, {part}", model, tokenizer, asked, 0, args, whole=True, **sampling)
    right = {
        (place, text.strip()): rows[place] | {"answer": text.strip()}
        for place, text in zip(places, texts, strict=True)
        if is_correct(text, rows[place]["answer"])
    }
    return [right[key] for key in sorted(right)]
