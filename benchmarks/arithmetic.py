"""What the arithmetic alone says of a training step, for models too large to be run here; nothing is timed.

A column of the base costs `body` multiplications on its way forward and as many back, and `head` for its logits. Plain
SoftCoT takes all P + N + R columns forward and back, with logits; its floor takes P forward, and N + R - 1 forward and
back with logits of R. Attention between columns is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from .models import Pair, make_pair
from .sizes import SIZES, Case

SHAPES = {
    "size `issue`": SIZES["issue"],
    "the same with a vocabulary of 32,000": replace(SIZES["issue"], vocabulary=32000),
    "size `7b`, that of Llama-3.1-8B and Llama-3.2-1B": SIZES["7b"],
}
PROMPTS = (55, 110, 220, 440, 880)


@dataclass(frozen=True)
class Model:
    """Multiplications of one column on its way forward.

    Args:
        body: Of all linear layers but the head.
        head: Of the head.
        width: Of a hidden state.
    """

    body: int
    head: int
    width: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Model:
        """Count the weights of a model."""
        head = model.get_output_embeddings()
        linear = (module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
        return cls(sum(linear) - head.weight.numel(), head.weight.numel(), head.weight.shape[1])


def of_step(pair: Pair, case: Case) -> tuple[int, int]:
    """Multiplications for one row: of the plain step and of the floor.

    Args:
        pair: The models, on any device.
        case: The batch, whose rows are as long as the longest.
    """
    base, assistant = Model.of(pair.base), Model.of(pair.assistant)
    prompt, num, response = case.prompt, case.thoughts, case.response
    projection = 2 * num * assistant.width * base.width  # forward, and the gradient of its weights
    plain = 2 * (prompt + num + response) * (base.body + base.head)
    plain += (prompt + num) * (assistant.body + assistant.head) + projection
    floor = (prompt + 2 * (num + response - 1)) * base.body + 2 * response * base.head
    floor += (prompt + num) * assistant.body + projection
    return plain, floor


def rows() -> Iterator[str]:
    """The lines of a table in Markdown: the floor's share of the plain step, by shape and length of the prompt."""
    yield "| multiplications, floor / plain | " + " | ".join(f"prompt {prompt}" for prompt in PROMPTS) + " |"
    yield "| --- |" + " --- |" * len(PROMPTS)
    for name, size in SHAPES.items():
        pair = make_pair(size, "meta")
        steps = [of_step(pair, replace(size.case, prompt=prompt)) for prompt in PROMPTS]
        yield f"| {name} | " + " | ".join(f"{floor / plain:.2f}" for plain, floor in steps) + " |"
