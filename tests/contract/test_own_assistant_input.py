"""`assistant_input_ids` are read instead of the prompt."""

from __future__ import annotations

import pytest
import torch
from batches import new_tokens, supervised, up_to_eos
from oracle import Oracle
from peft import PeftModel
from tiny_pair import QUESTIONS, Pair
from torch import Tensor

N = 4
NEW = 10
SIDES = pytest.mark.parametrize("side", ["left", "right"])


class TestTheCallersOwnAssistantInput:
    def own_input(self, pair: Pair, oracle: Oracle) -> dict[str, Tensor]:
        """What the reader would make, made by hand."""
        rows = [oracle.assistant_ids(row) + [0] * N for row in pair.rows(QUESTIONS)]
        width = max(map(len, rows))
        return {
            "assistant_input_ids": torch.tensor([[1] * (width - len(row)) + row for row in rows]),
            "assistant_attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        }

    @SIDES
    def test_it_is_read_instead_of_the_prompt(
        self, pair: Pair, model: PeftModel, oracle: Oracle, answers: list[list[int]], side: str
    ) -> None:
        batch, own = pair.batch(QUESTIONS, side), self.own_input(pair, oracle)
        output = model.generate(**batch, **own, max_new_tokens=NEW, do_sample=False)
        assert new_tokens(output, batch) == answers
        other = {name: value.flip(0) for name, value in own.items()}
        flipped = model.generate(**batch, **other, max_new_tokens=NEW, do_sample=False)
        assert new_tokens(flipped, batch) != answers
        train, rows = supervised(pair, side)
        torch.testing.assert_close(model(**train, **own).loss, oracle.mean_loss(rows), atol=1e-5, rtol=0)

    @SIDES
    def test_it_makes_embeddings_enough(
        self, pair: Pair, model: PeftModel, oracle: Oracle, answers: list[list[int]], side: str
    ) -> None:
        own = self.own_input(pair, oracle)
        embed = pair.load_base().get_input_embeddings()
        train, rows = supervised(pair, side)
        embeds = embed(train.pop("input_ids"))
        loss = model(inputs_embeds=embeds, **train, **own).loss
        torch.testing.assert_close(loss, oracle.mean_loss(rows), atol=1e-5, rtol=0)
        batch = pair.batch(QUESTIONS, side)
        output = model.generate(
            inputs_embeds=embed(batch["input_ids"]), attention_mask=batch["attention_mask"], **own,
            max_new_tokens=NEW, do_sample=False,
        )  # fmt: skip
        assert up_to_eos(output.tolist()) == answers

    def test_disabled_ignores_it(self, pair: Pair, model: PeftModel, oracle: Oracle) -> None:
        own = self.own_input(pair, oracle)
        batch = pair.batch(QUESTIONS)
        with model.disable_adapter():
            assert torch.equal(model(**batch, **own).logits, model(**batch).logits)
            model.generate(**batch, **own, max_new_tokens=2)
