"""Three short prompts of unlike length, and what a model says to them."""

from __future__ import annotations

import batches
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn

NEW = 6  # tokens of an answer
PROMPTS = [QUESTIONS[1], QUESTIONS[3], "Seven?"]


def answers(model: nn.Module, pair: Pair) -> list[list[int]]:
    """Greedy new tokens of each prompt, up to its EOS."""
    return batches.generated(model, pair.batch(PROMPTS), NEW)


def next_logits(model: nn.Module, pair: Pair) -> Tensor:
    """Logits of the token after each prompt."""
    return batches.next_logits(model, pair.batch(PROMPTS))
