"""Training steps with shortcuts (two passes, the loss without logits) have the loss of plain ones, or are plain."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import step
from helpers import cache_length, find_cache, head_is_last
from one_question import response_batch
from peft import get_peft_model
from tiny_pair import Pair, make_base
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaForCausalLM

# Bases that do something with their logits, and what half precision hides


def soft_capped(vocabulary: int) -> Gemma2ForCausalLM:
    """Small logits: in bfloat16, its cap changes none of them."""
    config = Gemma2Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        tie_word_embeddings=False, query_pre_attn_scalar=8, final_logit_softcapping=30.0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def scaled(vocabulary: int) -> GraniteForCausalLM:
    config = GraniteConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1, logits_scaling=1.01,
    )  # fmt: skip
    return GraniteForCausalLM(config)


def plain(vocabulary: int) -> LlamaForCausalLM:
    return make_base(vocabulary)


@pytest.mark.parametrize("loud", [False, True], ids=["small logits", "large logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("make", "alone"), [(soft_capped, False), (scaled, False), (plain, True)])
def test_the_head_is_passed_by_only_where_it_is_the_last_thing(
    pair: Pair, make: Callable[[int], Any], alone: bool, dtype: torch.dtype, loud: bool
) -> None:
    base, batch = make(len(pair.tokenizer)), response_batch(pair)
    if loud:
        base.lm_head.weight.data.mul_(20)
    steps = []
    for two in (True, False):
        torch.manual_seed(0)
        config = pair.config(two_pass_training=two, tokenizer_name_or_path=str(pair.base))
        model = get_peft_model(copy.deepcopy(base).to(dtype), config).train()
        steps.append(step(model, batch))
        if two:
            assert head_is_last(model) == alone
    (two_passes, found), (one_pass, expected) = steps
    assert two_passes.logits is None
    rounding = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}[dtype]
    torch.testing.assert_close(two_passes.loss, one_pass.loss, rtol=rounding, atol=rounding)
    assert (found - expected).norm() <= 3 * rounding * expected.norm()


class OneFurther(LlamaForCausalLM):
    """Counts positions after a cache one too far: less than what bfloat16 rounds by."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **inputs: Any) -> Any:
        seen = cache_length(find_cache(inputs))
        if seen:
            position_ids = torch.arange(seen + 1, seen + 1 + input_ids.shape[1])[None]
        return super().forward(input_ids=input_ids, position_ids=position_ids, **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_difference_as_small_as_rounding_is_found(
    pair: Pair, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "softcot_peft")
    small = pair.load_base()
    base = OneFurther(small.config)
    base.load_state_dict(small.state_dict())
    config = pair.config(tokenizer_name_or_path=str(pair.base))
    output, _ = step(get_peft_model(base.to(dtype), config).train(), response_batch(pair))
    assert output.logits is not None
    assert "not those of whole rows" in caplog.text


def test_trying_two_passes_leaves_the_weights_as_they_were(pair: Pair) -> None:
    base = pair.load_base().bfloat16()
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in base.named_parameters()}
    model = get_peft_model(base, pair.config()).train()
    assert step(model, response_batch(pair))[0].logits is None
    for name, weight in base.named_parameters():
        if name in before:
            assert weight.data_ptr() == before[name][0]
            assert torch.equal(weight, before[name][1])
    assert not any(module._forward_hooks for module in base.model.modules())


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate", "DefaultCPUAllocator: can't allocate memory"]
)
def test_want_of_memory_in_the_trial_decides_nothing(pair: Pair, message: str) -> None:
    model, batch = pair.model().train(), response_batch(pair)
    base, failed = model.get_base_model(), []

    def fail(module: nn.Module, args: Any) -> None:
        if not failed and not torch.is_grad_enabled():  # the trial has no gradients
            failed.append(True)
            raise RuntimeError(message)

    handle = base.model.layers[1].register_forward_pre_hook(fail)
    assert step(model, batch)[0].logits is not None
    assert failed
    handle.remove()
    assert step(model, batch)[0].logits is None


def test_other_errors_in_the_trial_decide(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "softcot_peft")
    model, batch = pair.model().train(), response_batch(pair)

    def fail(module: nn.Module, args: Any) -> None:
        if not torch.is_grad_enabled():
            raise RuntimeError("no cache here")

    model.get_base_model().model.layers[1].register_forward_pre_hook(fail)
    for _ in range(2):
        assert step(model, batch)[0].logits is not None
    assert caplog.text.count("it cannot continue from a cached prompt (no cache here)") == 1


# What depends on the length of a pass


@pytest.mark.parametrize("at", ["the wrapped embedding", "the embedding itself"])
def test_noise_on_embeddings_is_as_loud_as_in_one_pass(pair: Pair, at: str) -> None:
    batch, bounds = response_batch(pair), []
    for two in (True, False):
        model, heard = pair.model(two_pass_training=two).train(), list[int]()
        embedding = model.get_input_embeddings()
        hooked = embedding if at == "the wrapped embedding" else embedding.base_layer
        hooked.register_forward_hook(lambda module, args, out: heard.append(out.shape[1]))  # noqa: B023
        step(model, batch)
        bounds.append(heard)
    assert bounds[0] == bounds[1] == [batch["input_ids"].shape[1] + 4]


# Logits in training


@pytest.mark.parametrize("two", [True, False])
def test_logits_of_a_training_step_are_none_or_an_ordinary_tensor(pair: Pair, two: bool) -> None:
    output = pair.model(two_pass_training=two).train()(**response_batch(pair))
    assert (output.logits is None) == two
    assert two or type(output.logits) is Tensor
    assert output[0] is output.loss
    assert output.to_tuple()[0] is output.loss
