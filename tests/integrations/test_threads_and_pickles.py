"""Threads that share a model, and models that are pickled."""

from __future__ import annotations

import io
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import check_against, generated, next_logits
from helpers import backbone_of, given_assistants, loaded_assistants, reader_of, wrap_encoding
from oracle import Oracle
from peft import PeftModel
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from softcot_peft import use_assistant

NEW = 5


def new_tokens(model: nn.Module, batch: dict[str, Tensor]) -> list[list[int]]:
    return generated(model, batch, NEW, min_new_tokens=NEW)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_threads_can_share_a_model(pair: Pair, monkeypatch: pytest.MonkeyPatch, chat: bool) -> None:
    changes: dict[str, Any] = {}
    if chat:
        changes = {"assistant_model_name_or_path": str(pair.chat_assistant), "assistant_prompt": "{prompt} Think."}
    model = pair.model(**changes)
    texts = [*QUESTIONS, "[BOS] two [EOS] legs?"]  # the last one takes the way of prompts that spell special tokens
    batches = [pair.batch([text]) for text in texts]
    expected = [new_tokens(model, batch) for batch in batches]
    loaded_assistants().clear()
    fresh = pair.model(**changes)  # its assistant is loaded by the first thread to need it
    fresh.load_state_dict(model.state_dict())
    found: dict[int, list[Any]] = {}
    start, inside, most = threading.Barrier(len(batches)), [], []

    def watched(encode: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any) -> Any:
            inside.append(1)
            time.sleep(0.005)  # time for another thread to come in, were it let
            most.append(len(inside))
            result = encode(*args)
            inside.pop()
            return result

        return watch

    # Options of a tokenizer (whether it splits special tokens) are set in it while it encodes.
    wrap_encoding(monkeypatch, watched)

    def answer(index: int) -> None:
        start.wait()
        found[index] = [new_tokens(fresh, batches[index]) for _ in range(6)]

    threads = [threading.Thread(target=answer, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [tokens] * 6 for index, tokens in enumerate(expected)}
    assert set(most) == {1}


def read_again(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("read", [lambda m: pickle.loads(pickle.dumps(m)), read_again], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("bare", [False, True], ids=["peft", "bare"])
def test_a_pickled_model_answers_the_same(
    pair: Pair, model: PeftModel, oracle: Oracle, read: Callable[[nn.Module], Any], bare: bool
) -> None:
    original = model.get_base_model() if bare else model
    again = read(original)
    check_against(oracle, again, pair)
    assert new_tokens(again, pair.batch(QUESTIONS)) == new_tokens(model, pair.batch(QUESTIONS))
    with pytest.raises(ValueError, match="was called outside of a call"):
        (again if bare else again.get_base_model()).model(**pair.batch(QUESTIONS))
    if not bare:
        assert type(again.unload()) is type(model.get_base_model())


def test_a_pickled_model_holds_no_copy_of_the_assistant(pair: Pair, model: PeftModel) -> None:
    next_logits(model, pair.batch(QUESTIONS))  # the assistant is loaded
    weights = sum(parameter.nbytes for parameter in model.parameters())
    tokenizer = len(pickle.dumps(reader_of(model).base_tokenizer))
    assert len(pickle.dumps(backbone_of(model))) > 30_000
    assert len(pickle.dumps(model)) - weights - tokenizer < 30_000


def test_a_pickled_model_asks_for_the_assistant_it_was_given(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, model: PeftModel
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(pair.assistant)
    name = use_assistant(loaded, AutoTokenizer.from_pretrained(pair.assistant), name="given")
    given = pair.model(assistant_model_name_or_path=name)
    pickled = pickle.dumps(given)
    assert new_tokens(pickle.loads(pickled), pair.batch(QUESTIONS)) == new_tokens(given, pair.batch(QUESTIONS))
    monkeypatch.delitem(given_assistants(), name)
    with pytest.raises(ValueError, match=r"'given' of a pickled model .* must be given again"):
        pickle.loads(pickled)
