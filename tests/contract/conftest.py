"""One model for all tests of a file, which leave it as it was."""

from __future__ import annotations

import pytest
from oracle import Oracle
from peft import PeftModel
from saved_adapters import Saved, SavedChat, save, save_chat
from tiny_pair import QUESTIONS, Pair


@pytest.fixture(scope="module")
def model(pair: Pair) -> PeftModel:
    """Automatic placement of 4 thoughts, an assistant with another tokenizer."""
    return pair.model(thought_token="<thought>")


@pytest.fixture(scope="module")
def oracle(pair: Pair, model: PeftModel) -> Oracle:
    """What `model` must do."""
    return Oracle.of(model, pair.base, pair.assistant, 4)


@pytest.fixture(scope="module")
def answers(pair: Pair, oracle: Oracle) -> list[list[int]]:
    """The oracle's 10 greedy tokens, or fewer, for every question."""
    return [oracle.generate(row, 10) for row in pair.rows(QUESTIONS)]


@pytest.fixture(scope="module")
def saved(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(pair, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def chat(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> SavedChat:
    return save_chat(pair, tmp_path_factory.mktemp("chat_adapter"))
