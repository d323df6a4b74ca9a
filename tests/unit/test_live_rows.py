"""`examples/live_rows.py`: the tokens of `generate`, by fewer rows; nothing stays on the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import base_passes
from helpers import CACHE_NAME
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from project_files import load_example
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, StoppingCriteria, StoppingCriteriaList

live_rows = load_example("live_rows")
PROMPTS = [*QUESTIONS, "Nine?", "And ten?"]
ENDS = [3, 9, 1, 9, 5, 6]  # tokens of each row's answer
NEW = 9


class After(StoppingCriteria):
    """Ends each row after as many tokens as it is told."""

    def __init__(self, lengths: list[int], prompt: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] - self.prompt >= self.lengths


def plain(pair: Pair) -> nn.Module:
    return pair.load_base()


def softcot(pair: Pair) -> nn.Module:
    return pair.model()


def lora(pair: Pair) -> nn.Module:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(pair.load_base(), config).eval()


def prompt_tuning(pair: Pair) -> nn.Module:
    return get_peft_model(pair.load_base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()


def ask(model: nn.Module, pair: Pair, live: bool, lengths: list[int] = ENDS, **settings: Any) -> Tensor:
    """New ids `(B, NEW)`; the same random numbers each time."""
    batch = pair.batch(PROMPTS[: len(lengths)])
    after = After(lengths, batch["input_ids"].shape[1])
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW, "do_sample": False} | settings
    with live_rows.LiveRows(model, [after]) as criterion:
        chosen = StoppingCriteriaList([criterion if live else after])
        found = model.generate(**batch, stopping_criteria=chosen, **options)
    return found[:, batch["input_ids"].shape[1] :]


SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 0}


# PEFT's own, in every `generate` of its prompt tuning.
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", [plain, softcot, lora, prompt_tuning])
def test_tokens_are_those_of_all_rows(pair: Pair, method: Any, settings: dict[str, Any]) -> None:
    model = method(pair)
    whole = ask(model, pair, live=False, **settings)
    with base_passes(model) as rows:
        found = ask(model, pair, live=True, **settings)
    assert torch.equal(found, whole)
    assert rows == [6, 5, 5, 4, 4, 3, 2, 2, 2]
    lengths = (found != pair.tokenizer.pad_token_id).sum(1)
    assert (lengths <= torch.tensor(ENDS)).all()
    assert len({tuple(row) for row in found.tolist()}) == len(found)


def test_rows_end_with_the_models_own_eos(pair: Pair) -> None:
    model, batch = pair.model(), pair.batch(PROMPTS)
    model.get_base_model().generation_config.eos_token_id = list(range(1, 330, 12))
    whole = model.generate(**batch, max_new_tokens=40, do_sample=False)
    with base_passes(model) as rows, live_rows.LiveRows(model) as live:
        found = model.generate(
            **batch, max_new_tokens=40, do_sample=False, stopping_criteria=StoppingCriteriaList([live])
        )
    assert torch.equal(found, whole)
    assert len(set(rows)) > 2
    assert rows == sorted(rows, reverse=True)


def test_it_is_for_one_call(pair: Pair) -> None:
    base, batch = pair.load_base(), pair.batch(PROMPTS)
    options = {"max_new_tokens": NEW, "do_sample": False}
    with live_rows.LiveRows(base) as live:
        base.generate(**batch, **options, stopping_criteria=StoppingCriteriaList([live]))
        with pytest.raises(ValueError, match=r"went from \d+ to \d+. Make one for each call"):
            base.generate(**batch, **options, stopping_criteria=StoppingCriteriaList([live]))


def test_rows_that_others_end_are_padded_without_an_eos(pair: Pair) -> None:
    base = pair.load_base()
    base.generation_config.eos_token_id = None
    new = ask(base, pair, live=True, eos_token_id=None)
    assert [(row != pair.tokenizer.pad_token_id).sum() for row in new] == ENDS


@pytest.mark.parametrize("lengths", [[1, 1, 1], [2, 2], [9], [1, 9]], ids=str)
def test_rows_may_end_together(pair: Pair, lengths: list[int]) -> None:
    model = pair.model()
    assert torch.equal(ask(model, pair, True, lengths), ask(model, pair, False, lengths))


def test_rows_are_asked_for_now_and_then_on_a_gpu(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair.model()
    whole = ask(model, pair, live=False)
    monkeypatch.setattr(live_rows.LiveRows, "every", property(lambda self: 4))
    with base_passes(model) as rows:
        assert torch.equal(ask(model, pair, live=True), whole)
    assert rows == [6, 5, 5, 5, 5, 3, 3, 3, 3]


def test_rows_run_on_when_all_have_ended(pair: Pair) -> None:
    """As `generate` does on GPUs, a step or so."""
    base = pair.load_base()
    ids = torch.tensor([[7, 8], [9, 10]])
    with torch.no_grad(), live_rows.LiveRows(base, [After([1, 1], 1)]) as live:
        cache = base(ids)[CACHE_NAME]
        assert live(ids, None).all()
        assert base(input_ids=ids[:, :1], **{CACHE_NAME: cache}).logits.shape[0] == 2


def test_static_caches_keep_all_rows(pair: Pair) -> None:
    model = pair.model()
    with base_passes(model) as rows:
        found = ask(model, pair, live=True, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, ask(model, pair, live=False))
    assert rows == [6] * NEW


def test_states_without_keys_keep_all_rows(pair: Pair) -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=330, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.4)
    config.pad_token_id, config.eos_token_id = 0, 1
    model = MambaForCausalLM(config).eval()
    assert torch.equal(ask(model, pair, True), ask(model, pair, False))


def test_the_forward_is_the_models_own_again(pair: Pair) -> None:
    base = pair.load_base()

    class Failing(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            raise KeyboardInterrupt

    with live_rows.LiveRows(base, [Failing()]) as live:
        assert "forward" in vars(base)
        with pytest.raises(KeyboardInterrupt):
            base.generate(**pair.batch(PROMPTS), max_new_tokens=NEW, stopping_criteria=StoppingCriteriaList([live]))
    assert "forward" not in vars(base)
    with pytest.raises(KeyboardInterrupt), live_rows.LiveRows(base, []):
        raise KeyboardInterrupt
    assert "forward" not in vars(base)
    replaced = vars(base)["forward"] = base.forward  # as accelerate's hooks do
    with live_rows.LiveRows(base, []):
        pass
    assert vars(base)["forward"] is replaced
