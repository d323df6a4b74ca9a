"""Number of multiplications of a training step, for models too large to run here; nothing is timed.

A position of the base costs `body` multiplications in the forward pass, the same number in the backward pass, and
`head` for its logits. Plain SoftCoT runs all P + N + R positions forward and backward, with logits. The floor runs P
positions forward, and N + R - 1 forward and backward with logits of R. Attention between positions is not counted.
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
    """Multiplications of one position in the forward pass.

    Args:
        body: Multiplications of all linear layers except the head.
        head: Multiplications of the head.
        width: Width of the hidden states.
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
    """Return the multiplications of the plain step and of the floor for one row.

    Args:
        pair: The models, on any device.
        case: The batch; all rows have the maximum length.
    """
    base, assistant = Model.of(pair.base), Model.of(pair.assistant)
    prompt, num, response = case.prompt, case.thoughts, case.response
    projection = 2 * num * assistant.width * base.width  # forward, and gradient of the weights
    plain = 2 * (prompt + num + response) * (base.body + base.head)
    plain += (prompt + num) * (assistant.body + assistant.head) + projection
    floor = (prompt + 2 * (num + response - 1)) * base.body + 2 * response * base.head
    floor += (prompt + num) * assistant.body + projection
    return plain, floor


def rows() -> Iterator[str]:
    """Yield the lines of a Markdown table: floor relative to the plain step, by shape and prompt length."""
    yield "| multiplications, floor / plain | " + " | ".join(f"prompt {prompt}" for prompt in PROMPTS) + " |"
    yield "| --- |" + " --- |" * len(PROMPTS)
    for name, size in SHAPES.items():
        pair = make_pair(size, "meta")
        steps = [of_step(pair, replace(size.case, prompt=prompt)) for prompt in PROMPTS]
        yield f"| {name} | " + " | ".join(f"{floor / plain:.2f}" for plain, floor in steps) + " |"
