"""The assistant runs once per forward pass and once per `generate`."""

from __future__ import annotations

from typing import Any

import pytest
from batches import supervised
from helpers import assistant_passes
from peft import PeftModel
from tiny_pair import QUESTIONS, Pair


class TestLine6OneAssistantPass:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_cache": False},
            {"num_beams": 3, "num_return_sequences": 3},
            {"do_sample": True, "num_return_sequences": 4},
            {"prefill_chunk_size": 4},
        ],
        ids=["greedy", "uncached", "beams", "samples", "chunked"],
    )
    def test_once_per_generate(self, pair: Pair, model: PeftModel, options: dict[str, Any]) -> None:
        with assistant_passes(model) as calls:
            model.generate(**pair.batch(QUESTIONS), max_new_tokens=5, **{"do_sample": False, **options})
        assert calls == [len(QUESTIONS)]

    def test_once_per_forward_and_never_when_disabled(self, pair: Pair, model: PeftModel) -> None:
        batch, _ = supervised(pair, "right")
        with assistant_passes(model) as calls:
            model(**batch).loss.backward()
            assert calls == [len(QUESTIONS)]
            with model.disable_adapter():
                model(**batch)
                model.generate(**pair.batch(QUESTIONS), max_new_tokens=2)
        assert calls == [len(QUESTIONS)]
