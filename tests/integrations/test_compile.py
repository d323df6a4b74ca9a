"""`torch.compile` of a model with an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import CLOSE, generated, next_logits
from oracle import Oracle
from peft import PeftModel
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn

NEW = 5


def new_tokens(model: nn.Module, batch: dict[str, Tensor]) -> list[list[int]]:
    return generated(model, batch, NEW, min_new_tokens=NEW)


COMPILED: dict[str, Callable[[PeftModel], nn.Module]] = {
    "torch.compile(model)": lambda model: torch.compile(model, backend="eager"),
    "torch.compile(base)": lambda model: torch.compile(model.get_base_model(), backend="eager"),
    "model.compile()": lambda model: model.compile(backend="eager") or model,
    "base.compile()": lambda model: model.get_base_model().compile(backend="eager") or model,
}


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # of the compiler: graph breaks, and what it finds in torch's own code
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("way", COMPILED)
def test_a_compiled_model_reads_each_batch_s_own_thoughts(
    pair: Pair, model: PeftModel, oracle: Oracle, way: str
) -> None:
    expected = new_tokens(model, pair.batch(QUESTIONS))
    compiled = COMPILED[way](model)
    prompts = [row[:9] for row in pair.rows(QUESTIONS)]
    for first in range(3):  # the same shapes, other prompts: nothing of the first call may stay
        rows = prompts[first : first + 2]
        found = next_logits(compiled, {"input_ids": torch.tensor(rows)})
        for row, logits in zip(rows, found, strict=True):
            torch.testing.assert_close(logits, oracle.logits(row, [])[-1], **CLOSE)
    assert new_tokens(compiled, pair.batch(QUESTIONS)) == expected
    with model.disable_adapter():
        plain = next_logits(pair.load_base(), {"input_ids": torch.tensor(prompts)})
        torch.testing.assert_close(next_logits(compiled, {"input_ids": torch.tensor(prompts)}), plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_trains(pair: Pair, model: PeftModel) -> None:
    batch = pair.batch(QUESTIONS, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :6] = -100
    results = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        loss = call(**batch, labels=labels).loss
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
        results.append([loss.detach(), *gradients])
    torch.testing.assert_close(results[1], results[0], **CLOSE)
