"""The assistant reads in eval mode, gets no gradient, and every module has its own mode back afterwards."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from batches import next_logits, training_loss
from helpers import backbone_of, evaluating
from peft import get_peft_model
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from softcot_peft import use_assistant

pytestmark = pytest.mark.usefixtures("nothing_given")


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("given", [False, True])
def test_the_assistant_runs_in_eval_mode_while_the_model_trains(pair: Pair, given: bool) -> None:
    twin = AutoModelForCausalLM.from_pretrained(pair.twin).train()  # GPT-2, with a dropout of 0.1
    if given:
        use_assistant(twin)
    model = pair.model(assistant_model_name_or_path=str(pair.twin))
    expected = next_logits(model, pair.batch(QUESTIONS))
    model.train()
    backbone = backbone_of(model)
    backbone.train()  # whoever does that
    backbone.h[0].eval()
    chosen, seen = modes(backbone), []
    backbone.register_forward_pre_hook(lambda *_: seen.append(modes(backbone)))
    loss = training_loss(model, pair.batch(QUESTIONS))
    assert torch.equal(training_loss(model, pair.batch(QUESTIONS)), loss)
    assert seen
    assert not any(map(any, seen))
    assert modes(backbone) == chosen  # its user's business
    model.eval()
    assert torch.equal(next_logits(model, pair.batch(QUESTIONS)), expected)


def test_modes_come_back_after_an_error(pair: Pair) -> None:
    given = AutoModelForCausalLM.from_pretrained(pair.twin).train()
    use_assistant(given)
    model = pair.model(assistant_model_name_or_path=str(pair.twin))

    def fail(*_: Any) -> None:
        assert not given.base_model.h[1].training
        raise RuntimeError("out of memory")

    given.base_model.h[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        next_logits(model, pair.batch(QUESTIONS))
    assert all(modes(given))


def test_modes_come_back_with_the_last_of_several_readings(pair: Pair) -> None:
    given = AutoModelForCausalLM.from_pretrained(pair.twin).train()
    given.base_model.drop.eval()
    chosen = modes(given)
    use_assistant(given)
    models = [pair.model(assistant_model_name_or_path=str(pair.twin)) for _ in range(3)]
    expected, meeting, seen = next_logits(models[0], pair.batch(QUESTIONS)), threading.Barrier(len(models)), []

    def meet(*_: Any) -> None:
        meeting.wait(timeout=60)  # all are inside, and nobody leaves before
        seen.append(any(modes(given.base_model)))

    def leave(*_: Any) -> None:
        seen.append(any(modes(given.base_model)))

    given.base_model.h[0].register_forward_pre_hook(meet)
    given.base_model.h[1].register_forward_hook(leave)
    found: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda own=own: found.append(next_logits(own, pair.batch(QUESTIONS))))
        for own in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [False] * 6
    assert len(found) == 3
    assert all(torch.equal(one, expected) for one in found)
    assert modes(given) == chosen


def test_overlapping_models_are_put_back_by_whoever_leaves_last() -> None:
    whole = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    whole[1][0].eval()
    chosen = modes(whole)
    for outer, inner in ((whole, whole[1]), (whole[1], whole)):
        first, second = evaluating(outer), evaluating(inner)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)  # in the order of threads, not of blocks
        assert not any(modes(inner))
        second.__exit__(None, None, None)
        assert modes(whole) == chosen


def test_a_base_that_is_its_own_assistant_stays_in_training_mode(pair: Pair) -> None:
    base = AutoModelForCausalLM.from_pretrained(pair.twin)
    use_assistant(base, AutoTokenizer.from_pretrained(pair.twin), name="itself")
    torch.manual_seed(0)
    model = get_peft_model(base, pair.config(assistant_model_name_or_path="itself"))
    model.train()
    chosen, seen = modes(model), []
    base.transformer.drop.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    losses = []
    for _ in range(2):
        seen.clear()
        losses.append(training_loss(model, pair.batch(QUESTIONS)))
        assert {True, False} == set(seen)  # the base's own passes, and the reading
        assert modes(model) == chosen
    assert not torch.equal(*losses)  # dropout acts


@pytest.mark.filterwarnings("ignore:Gradient checkpointing turns two-pass training off:UserWarning")
def test_a_base_that_is_its_own_assistant_keeps_checkpointing(pair: Pair) -> None:
    base = pair.load_base()
    use_assistant(base, pair.tokenizer, name="itself")
    model = get_peft_model(base, pair.config(assistant_model_name_or_path="itself"))
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
    model.train()
    passes: list[bool] = []
    base.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    for _ in range(2):  # in the first one, padding is tried
        passes.clear()
        training_loss(model, pair.batch(QUESTIONS)).backward()
    assert len(passes) == 3  # of the assistant, of the step, and again in the backward pass


@pytest.mark.parametrize("given", [False, True])
def test_no_gradient_reaches_the_assistant(pair: Pair, given: bool) -> None:
    if given:
        use_assistant(AutoModelForCausalLM.from_pretrained(pair.assistant).requires_grad_(True))
    model = pair.model()
    training_loss(model, pair.batch(QUESTIONS)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    frozen = list(backbone_of(model).parameters())
    assert all(p.grad is None for p in frozen)
    assert {p.requires_grad for p in frozen} == {given}  # a given model is not changed
