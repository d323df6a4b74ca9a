"""The assistant reads only what stands before the thoughts."""

from __future__ import annotations

import torch
from batches import supervised
from helpers import recorded_thoughts
from peft import PeftModel
from tiny_pair import QUESTIONS, Pair


class TestLine2NoLeak:
    def test_no_later_token_changes_a_thought(self, pair: Pair, model: PeftModel) -> None:
        batch, _ = supervised(pair, "right")
        with recorded_thoughts(model) as thoughts:
            model(**batch)
            response = batch["labels"] != -100
            changed = torch.where(response, 100 + (batch["input_ids"] + 7) % 100, batch["input_ids"])
            model(**{**batch, "input_ids": changed, "labels": torch.where(response, changed, -100)})
            prompt = batch["input_ids"].clone()
            prompt[:, 1] = 100 + (prompt[:, 1] + 7) % 100
            model(**{**batch, "input_ids": prompt})
        assert torch.equal(thoughts[0], thoughts[1])
        assert not torch.allclose(thoughts[0], thoughts[2], atol=1e-3)  # and the prompt does

    def test_nothing_after_a_run_changes_a_thought(self, pair: Pair, model: PeftModel) -> None:
        with recorded_thoughts(model) as thoughts:
            for tail in (" one", " two"):
                model(**pair.batch([QUESTIONS[0] + "<thought>" * 3 + tail]))
        assert torch.equal(thoughts[0], thoughts[1])
