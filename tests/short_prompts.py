"""Three short prompts of unlike length, and what a model says to them."""

from __future__ import annotations

import conftest
from conftest import QUESTIONS, Pair
from torch import Tensor, nn

NEW = 6  # tokens of an answer
PROMPTS = [QUESTIONS[1], QUESTIONS[3], "Seven?"]


def answers(model: nn.Module, pair: Pair) -> list[list[int]]:
    """Greedy new tokens of each prompt, up to its EOS."""
    batch = pair.batch(PROMPTS)
    found = model.generate(**batch, max_new_tokens=NEW)[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: row.index(1) + 1] if 1 in row else row for row in found]


def next_logits(model: nn.Module, pair: Pair) -> Tensor:
    """Logits of the token after each prompt."""
    return conftest.next_logits(model, pair.batch(PROMPTS))
