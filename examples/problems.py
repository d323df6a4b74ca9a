"""The problems of GSM8K: rows, prompts, labels, and exact match."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # evaluation/ is not an installed package
from evaluation.answers import number

DELIMITERS = ("<question>\n", "\n</question>")  # the assistant reads what stands between them
PROMPT = (
    "Reason about this problem step by step, then close with a line '#### N' for its answer N.\n\n"
    "<question>\n{question}\n</question>"
)
Row = dict[str, str]  # "question" and "answer"
Example = dict[str, list[int]]  # "input_ids" and "labels"


def load_rows(source: str, split: str, limit: int | None = None) -> list[Row]:
    """Load problems from a JSON Lines file, or from a split of a data set on the Hub."""
    if Path(source).is_file():
        return [json.loads(line) for line in Path(source).read_bytes().splitlines() if line.strip()][:limit]
    from datasets import load_dataset  # local files do not need it

    return list(load_dataset(source, "main", split=split))[:limit]


def is_correct(solution: str, reference: str) -> bool:
    """Return whether the answers are the same number; `$1,234.00` equals `1234`."""
    return (found := number(solution)) is not None and found == number(reference)


def prompt_text(question: str) -> str:
    """Return the text of a prompt, in which each delimiter occurs once: tags in the question itself are broken up."""
    return PROMPT.format(question=re.sub("<(?=/?question>)", "< ", question, flags=re.IGNORECASE))


def encode_prompt(tokenizer: Tokenizer, question: str, num_thoughts: int = 0) -> list[int]:
    """Encode a prompt with its generation prompt; `num_thoughts` is for the template of `with_thought_tokens`."""
    content = prompt_text(question)
    if tokenizer.chat_template is None:
        return tokenizer(content + "\n\nSolution:\n")["input_ids"]
    turns, options = [{"role": "user", "content": content}], {"num_thought_tokens": num_thoughts}
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)["input_ids"]


def encode_example(tokenizer: Tokenizer, row: Row, num_thoughts: int = 0, keep_marks: bool = False) -> Example:
    """Encode a training row: prompt, answer and EOS, with labels on answer and EOS."""
    prompt = encode_prompt(tokenizer, row["question"], num_thoughts)
    answer = row["answer"] if keep_marks else re.sub(r"<<.*?>>", "", row["answer"])
    response = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}
