"""The prompts, gold answers and scoring of the tasks of `evaluation/`, without lm-evaluation-harness.

Every system reads the same prompt: the task's own text, with two delimiters around what is asked, so that the
assistant can read the question alone, and rendered with the base's chat template.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from jinja2.sandbox import SandboxedEnvironment
from train_gsm8k import DELIMITERS
from transformers import PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).parents[2]))  # evaluation/ is not an installed package
from evaluation import answers

FOLDER = Path(answers.__file__).parent
Row = Mapping[str, Any]


class _Loader(yaml.SafeLoader):
    """Reads the harness's `!function module.name` as a text."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@lru_cache
def definition(task: str) -> dict[str, Any]:
    """Return a task's fields, with those that it includes."""
    path = FOLDER / (task if task.startswith("_") else f"{task}.yaml")
    own = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  # a safe loader
    included = own.pop("include", None)
    return (definition(included) if included else {}) | own


def question_text(task: str, row: Row) -> str:
    """Return the text of a task's prompt, in which each delimiter occurs once around the question and its options."""
    template = definition(task)["doc_to_text"]
    end = template.rfind("{% endfor %}")
    place = end + len("{% endfor %}") if end >= 0 else template.index("{{question}}") + len("{{question}}")
    environment = SandboxedEnvironment(autoescape=False)  # prompts are no HTML
    clean = {**row, "question": re.sub("<(?=/?question>)", "< ", row["question"], flags=re.IGNORECASE)}
    inside, request = (environment.from_string(part).render(clean) for part in (template[:place], template[place:]))
    return f"{DELIMITERS[0]}{inside.strip()}{DELIMITERS[1]}\n\n{request.strip()}"


def between(prompt: str) -> str:
    """Return what stands between the delimiters of a prompt."""
    return prompt.partition(DELIMITERS[0])[2].rpartition(DELIMITERS[1])[0]


def rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return the prompt: a user turn and the generation prompt."""
    if tokenizer.chat_template is None:
        return text + "\n\n"
    turns = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def extracted(task: str, row: Row, text: str) -> str:
    """Return the canonical answer of a generated text, `answers.INVALID` if it has none."""
    name = definition(task)["filter_list"][0]["filter"][0]["filter_fn"].removeprefix("answers.")
    return str(getattr(answers, name)([[text]], [row])[0][0])
