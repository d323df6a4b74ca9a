"""Ways to run or change a base other than calling it carry thoughts or are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import check_against, generated, one_more
from helpers import CACHE_NAME
from oracle import Oracle
from peft import PeftModel, get_peft_model
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from softcot_peft import use_assistant

N, NEW = 4, 5


def new_tokens(model: nn.Module, batch: dict[str, Tensor]) -> list[list[int]]:
    return generated(model, batch, NEW, min_new_tokens=NEW)


# Calls of the base's parts

PARTS: dict[str, Callable[[PeftModel], Callable[..., Any]]] = {
    "backbone": lambda model: model.get_base_model().model,
    "base_model": lambda model: model.get_base_model().base_model,
    "decoder": lambda model: model.get_base_model().get_decoder(),
    "forward": lambda model: model.get_base_model().forward,
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_base_refuses_to_run_by_itself(pair: Pair, model: PeftModel, part: str, training: bool) -> None:
    model.train(training)
    with pytest.raises(ValueError, match=r"`LlamaModel` was called outside of a call of `LlamaForCausalLM`.*disable"):
        PARTS[part](model)(**pair.batch(QUESTIONS))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_base_runs_while_adapters_are_disabled(pair: Pair, model: PeftModel, part: str) -> None:
    batch, plain = pair.batch(QUESTIONS), pair.load_base()
    expected = plain(**batch).logits if part == "forward" else plain.model(**batch).last_hidden_state
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(PARTS[part](model)(**batch)[0], expected)
    model.unload()
    assert torch.equal(PARTS[part](model)(**batch)[0], expected)


def test_the_base_itself_carries_thoughts(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    check_against(oracle, model.get_base_model(), pair)
    check_against(oracle, model.base_model, pair)


def test_the_embedding_by_itself_looks_tokens_up(pair: Pair, model: PeftModel) -> None:
    ids = pair.batch(QUESTIONS)["input_ids"]
    assert torch.equal(model.get_input_embeddings()(ids), pair.load_base().get_input_embeddings()(ids))


# Continuous batching, copies, replaced embeddings


def test_continuous_batching_is_refused(pair: Pair, model: PeftModel) -> None:
    options = GenerationConfig(max_new_tokens=2)
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        for door in (model, model.get_base_model()):
            with pytest.raises(ValueError, match=f"`{name}` must not be called with an active SoftCoT adapter"):
                getattr(door, name)(pair.rows(QUESTIONS), generation_config=options)
    with pytest.raises(ValueError, match="`cache_implementation` must not be 'paged'"):
        model.generate(**pair.batch(QUESTIONS), cache_implementation="paged")


def test_continuous_batching_is_the_base_s_own_while_adapters_are_disabled(model: PeftModel) -> None:
    with model.disable_adapter():
        manager = model.init_continuous_batching(GenerationConfig(eos_token_id=1, pad_token_id=0))
    assert not manager.is_running()
    assert manager.model is model.get_base_model()


def test_data_parallel_copies_are_refused(model: PeftModel) -> None:
    # `nn.DataParallel` makes its replicas so; it needs two GPUs to get there.
    with pytest.raises(RuntimeError, match=r"`nn.DataParallel` must not copy.*accelerate launch"):
        _ = [module._replicate_for_data_parallel() for module in model.modules()]


def test_a_shallow_copy_is_the_same_function(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    check_against(oracle, copy.copy(model.get_base_model()), pair)


@pytest.mark.parametrize("bare", [False, True], ids=["peft", "bare"])
def test_resizing_the_embeddings_is_refused(pair: Pair, model: PeftModel, oracle: Oracle, bare: bool) -> None:
    with pytest.raises(ValueError, match=r"`resize_token_embeddings` must be called before.*`unload\(\)`"):
        (model.get_base_model() if bare else model).resize_token_embeddings(400)
    check_against(oracle, model, pair)
    assert model.unload().resize_token_embeddings(400).num_embeddings == 400


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_embedding_replaced_after_attaching_is_refused(pair: Pair, model: PeftModel, call: str) -> None:
    base = model.get_base_model()
    base.set_input_embeddings(nn.Embedding.from_pretrained(model.get_input_embeddings().weight))
    batch = pair.batch(QUESTIONS)
    with pytest.raises(RuntimeError, match="must write the thoughts, but was not run"):
        model(**batch, logits_to_keep=1) if call == "forward" else model.generate(**batch, max_new_tokens=2)


def test_a_logits_processor_may_run_the_model(pair: Pair, model: PeftModel) -> None:
    batch = pair.batch(QUESTIONS)
    expected, seen = new_tokens(model, batch), []

    def look(ids: Tensor, scores: Tensor) -> Tensor:
        mask = one_more(batch, ids[:, batch["input_ids"].shape[1] :])["attention_mask"]
        seen.append(model(input_ids=ids, attention_mask=mask, **{CACHE_NAME: DynamicCache()}).logits[:, -1])
        torch.testing.assert_close(seen[-1], scores, atol=1e-4, rtol=1e-4)
        return scores

    found = model.generate(**batch, max_new_tokens=NEW, logits_processor=[look])
    assert found[:, batch["input_ids"].shape[1] :].tolist() == expected
    assert len(seen) == NEW


def test_a_base_can_be_its_own_assistant(pair: Pair) -> None:
    base = pair.load_base()
    name = use_assistant(base, pair.tokenizer, name="itself")
    model = get_peft_model(base, pair.config(assistant_model_name_or_path=name))
    oracle = Oracle.of(model, pair.base, pair.base, N, same_ids=True)
    check_against(oracle, model, pair)
    for row, found in zip(pair.rows(QUESTIONS), new_tokens(model, pair.batch(QUESTIONS)), strict=True):
        expected = oracle.generate(row, NEW)
        assert found[: len(expected)] == expected
