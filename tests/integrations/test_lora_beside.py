"""A LoRA and SoftCoT on one base: both train, both are saved, both load; what cannot be combined says so.

The recipe: two names, and SoftCoT attached to the base itself, on which the LoRA is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import collate, labelled, responses_of
from helpers import PROJECTION
from oracle import Oracle
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from short_prompts import NEW, PROMPTS, answers, next_logits
from tiny_pair import Pair
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

N = 4
RESPONSES = [" They have twenty eight legs.", " Five.", " Yes, eight."]
LORA = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"])
LARGE = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

# peft's own, whenever a base that carries an adapter gets another one
pytestmark = pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time:UserWarning"
)


# Ways to attach both, the last one to a bare base


def inject_then_attach(pair: Pair) -> nn.Module:
    return get_peft_model(inject_adapter_in_model(LORA, pair.load_base(), "tuned"), pair.config(), "thoughts")


def wrap_then_attach(pair: Pair) -> nn.Module:
    tuned = get_peft_model(pair.load_base(), LORA, "tuned")
    return get_peft_model(tuned.get_base_model(), pair.config(), "thoughts")


def attach_then_inject(pair: Pair) -> nn.Module:
    model = get_peft_model(pair.load_base(), pair.config(), "thoughts")
    every = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")  # but not the projection
    inject_adapter_in_model(every, model.get_base_model(), "tuned")
    return model


def add_then_attach(pair: Pair) -> nn.Module:
    base = pair.load_base()
    base.add_adapter(LORA, "tuned")
    return get_peft_model(base, pair.config(), "thoughts")


def add_both(pair: Pair) -> nn.Module:
    base = pair.load_base()
    base.add_adapter(LORA, "tuned")
    base.add_adapter(pair.config(), "thoughts")
    base.set_adapter(["tuned", "thoughts"])
    return base


# Ways to load both


def load_both(base: PreTrainedModel, folder: Path) -> nn.Module:
    for name in ("tuned", "thoughts"):
        base.load_adapter(str(folder / name), name)
    base.set_adapter(["tuned", "thoughts"])
    return base


def load_then_attach(base: PreTrainedModel, folder: Path) -> nn.Module:
    base.load_adapter(str(folder / "tuned"), "tuned")
    return PeftModel.from_pretrained(base, folder / "thoughts", "thoughts")


def wrap_then_load(base: PreTrainedModel, folder: Path) -> nn.Module:
    tuned = PeftModel.from_pretrained(base, folder / "tuned", "tuned")
    return PeftModel.from_pretrained(tuned.get_base_model(), folder / "thoughts", "thoughts")


ATTACH = [inject_then_attach, wrap_then_attach, attach_then_inject, add_then_attach, add_both]
LOAD = [load_both, load_then_attach, wrap_then_load]


def examples(pair: Pair) -> list[dict[str, list[int]]]:
    return labelled(pair.rows(PROMPTS), responses_of(pair, RESPONSES))


def train(model: nn.Module, pair: Pair, steps: int = 3) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for _ in range(steps):
        model.train()(**collate(examples(pair))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def save(model: nn.Module, folder: Path) -> None:
    if isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return
    for name in ("tuned", "thoughts"):  # transformers saves one active adapter at a time
        model.set_adapter(name)
        model.save_pretrained(folder / name)
    model.set_adapter(["tuned", "thoughts"])


def merged_oracle(pair: Pair, folder: Path, scratch: Path) -> Oracle:
    """The oracle over a base into which the saved LoRA was merged, with the saved projection."""
    PeftModel.from_pretrained(pair.load_base(), folder / "tuned").merge_and_unload().save_pretrained(scratch)
    pair.tokenizer.save_pretrained(scratch)
    stored = load_file(folder / "thoughts" / "adapter_model.safetensors")
    weight, bias = (next(v for k, v in stored.items() if k.endswith(part)) for part in ("weight", "bias"))
    return Oracle(scratch, pair.assistant, weight, bias, N)


def check(model: nn.Module, oracle: Oracle, pair: Pair) -> None:
    """Logits and tokens are the oracle's."""
    rows = pair.rows(PROMPTS)
    with torch.no_grad():
        expected = torch.stack([oracle.logits(row, [])[-1] for row in rows])
    torch.testing.assert_close(next_logits(model, pair), expected, atol=1e-4, rtol=1e-4)
    assert answers(model, pair) == [oracle.generate(row, NEW) for row in rows]


@pytest.mark.parametrize("attach", ATTACH)
def test_both_train_and_nothing_else(attach: Callable[[Pair], nn.Module], pair: Pair) -> None:
    torch.manual_seed(0)
    model, base = attach(pair), pair.load_base().state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "softcot_" in name} == {
        name for name in model.state_dict() if f"{PROJECTION}.thoughts" in name
    }
    assert trained == {name for name in model.state_dict() if ".thoughts." in name or ".tuned." in name}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, pair)
    after = model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == trained
    frozen = {plain_name(name): tensor for name, tensor in after.items() if name not in trained}
    assert frozen.keys() == base.keys()
    assert all(torch.equal(frozen[name], base[name]) for name in base)


@pytest.mark.parametrize("load", LOAD)
@pytest.mark.parametrize("attach", ATTACH)
def test_both_are_saved_and_load_to_the_oracle_over_the_merged_base(
    attach: Callable[[Pair], nn.Module],
    load: Callable[[PreTrainedModel, Path], nn.Module],
    pair: Pair,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = attach(pair)
    train(model, pair)
    save(model, tmp_path)
    names = {name: set(load_file(tmp_path / name / "adapter_model.safetensors")) for name in ("tuned", "thoughts")}
    assert all("lora_" in name for name in names["tuned"])
    assert {name.rsplit(".", 2)[-2] for name in names["thoughts"]} == {PROJECTION}

    oracle = merged_oracle(pair, tmp_path, tmp_path / "merged")
    check(model, oracle, pair)
    check(load(pair.load_base(), tmp_path).eval(), oracle, pair)
    alone = Oracle(pair.base, pair.assistant, oracle.weight, oracle.bias, N)  # so that a LoRA left out is seen
    row = pair.rows(PROMPTS)[0]
    with torch.no_grad():
        assert not torch.allclose(oracle.logits(row, [])[-1], alone.logits(row, [])[-1], atol=1e-2)


@pytest.mark.parametrize("attach", [add_then_attach, attach_then_inject])
def test_the_trainer_s_checkpoints_hold_both(attach: Callable[[Pair], nn.Module], pair: Pair, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = attach(pair)
    arguments: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    settings = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=1e-2, save_strategy="steps", save_steps=2, **arguments
    )
    Trainer(model, settings, collate, train_dataset=examples(pair)).train()
    model.eval()
    folder = tmp_path / "checkpoint-2"
    check(model, merged_oracle(pair, folder, tmp_path / "merged"), pair)
    torch.testing.assert_close(
        next_logits(load_then_attach(pair.load_base(), folder).eval(), pair), next_logits(model, pair)
    )


def test_disabling_leaves_the_plain_base_and_unloading_gives_it_back(pair: Pair) -> None:
    model = add_then_attach(pair).eval()
    train(model, pair)
    plain = pair.load_base().requires_grad_(False)  # as torch's matmul looks at it
    with model.disable_adapter():
        assert torch.equal(next_logits(model, pair), next_logits(plain, pair))
        assert answers(model, pair) == answers(plain, pair)
    base = model.unload()  # of all adapters, as PEFT's `unload` always does
    assert not any("lora_" in name or "softcot_" in name for name in base.state_dict())
    assert torch.equal(next_logits(base, pair), next_logits(plain, pair))
    assert answers(base, pair) == answers(plain, pair)


def test_deleting_soft_thoughts_leaves_the_lora(pair: Pair) -> None:
    torch.manual_seed(0)
    tuned = get_peft_model(pair.load_base(), LARGE, "tuned").eval()
    expected = next_logits(tuned, pair)
    model = get_peft_model(tuned.get_base_model(), pair.config(), "thoughts").eval()
    assert not torch.allclose(next_logits(model, pair), expected, atol=1e-2)
    model.delete_adapter("thoughts")
    torch.testing.assert_close(next_logits(tuned, pair), expected)


def test_the_status_tells_of_both(pair: Pair) -> None:
    model = add_then_attach(pair)
    status = model.get_model_status()
    assert status.peft_types == {"tuned": "LORA", "thoughts": "SOFTCOT"}
    assert status.requires_grad == {"tuned": True, "thoughts": True}
    assert set(status.available_adapters) == {"tuned", "thoughts"}
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_lora_merged_before_is_part_of_the_base(pair: Pair, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tuned = get_peft_model(pair.load_base(), LARGE, "tuned").eval()
    model = get_peft_model(tuned.get_base_model(), pair.config(), "thoughts").eval()
    expected = next_logits(model, pair)
    unmerged = answers(model, pair)
    with pytest.raises(ValueError, match="SoftCoT adapter cannot be merged"):
        tuned.merge_adapter()
    assert torch.equal(next_logits(model, pair), expected)  # nothing was merged

    base = pair.load_base()
    torch.manual_seed(0)
    tuned = get_peft_model(base, LARGE, "tuned").eval()
    tuned.merge_adapter()
    model = get_peft_model(tuned.get_base_model(), pair.config(), "thoughts").eval()
    torch.testing.assert_close(next_logits(model, pair), expected, atol=1e-4, rtol=1e-4)
    assert answers(model, pair) == unmerged
    with pytest.warns(UserWarning, match="Already unmerged"):
        tuned.unmerge_adapter()
    torch.testing.assert_close(next_logits(model, pair), expected, atol=1e-4, rtol=1e-4)


# What cannot be combined


@pytest.mark.parametrize("way", ["get_peft_model", "from_pretrained"])
def test_the_name_of_a_lora_is_refused_and_the_lora_stays_whole(pair: Pair, way: str, tmp_path: Path) -> None:
    tuned = get_peft_model(pair.load_base(), LARGE).eval()
    expected = next_logits(tuned, pair)
    pair.model().save_pretrained(tmp_path / "thoughts")
    attach = {
        "get_peft_model": lambda base: get_peft_model(base, pair.config()),
        "from_pretrained": lambda base: PeftModel.from_pretrained(base, tmp_path / "thoughts"),
    }[way]
    with pytest.raises(ValueError, match="LORA") as info:
        attach(tuned.get_base_model())
    assert "`adapter_name` must be new to the base, got 'default'" in str(info.value)
    assert "adapter_name='thoughts'" in str(info.value)
    assert torch.equal(next_logits(tuned, pair), expected)
    tuned.save_pretrained(tmp_path / "lora")
    loaded = PeftModel.from_pretrained(pair.load_base(), tmp_path / "lora").eval()
    torch.testing.assert_close(next_logits(loaded, pair), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    ],
    ids=["target_modules", "modules_to_save", "trainable_token_indices"],
)
def test_an_embedding_that_another_adapter_has_is_refused(pair: Pair, changes: dict[str, Any]) -> None:
    tuned = get_peft_model(pair.load_base(), LoraConfig(task_type="CAUSAL_LM", r=2, **changes), "tuned").eval()
    expected = next_logits(tuned, pair)
    with pytest.raises(ValueError, match="input embedding must be free of other adapters") as info:
        get_peft_model(tuned.get_base_model(), pair.config(), "thoughts")
    assert "peft." in str(info.value)
    assert set(tuned.peft_config) == {"tuned"}
    assert torch.equal(next_logits(tuned, pair), expected)
    merged = get_peft_model(tuned.merge_and_unload(), pair.config()).eval()  # as the message says
    assert not torch.allclose(next_logits(merged, pair), expected, atol=1e-2)


def test_a_model_that_peft_has_wrapped_is_refused_and_stays_whole(pair: Pair) -> None:
    for model in (get_peft_model(pair.load_base(), LARGE, "tuned").eval(), pair.model()):
        expected, configs = next_logits(model, pair), dict(model.peft_config)
        for name in ("new", "default"):  # the second one names an adapter of the second model
            with pytest.raises(TypeError, match="got PeftModelForCausalLM") as info:
                get_peft_model(model, pair.config(), name)
            assert "`get_base_model()`" in str(info.value)
            assert model.peft_config.keys() == configs.keys()
            assert all(model.peft_config[key] is config for key, config in configs.items())
            assert torch.equal(next_logits(model, pair), expected)


def test_peft_refuses_other_types_beside_soft_thoughts_in_one_peft_model(pair: Pair) -> None:
    model = pair.model()
    expected = next_logits(model, pair)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("tuned", LORA)
    assert torch.equal(next_logits(model, pair), expected)
    with pytest.raises(ValueError, match="'SOFTCOT' is not compatible with the `PeftMixedModel`"):
        get_peft_model(pair.load_base(), pair.config(), mixed=True)


def test_a_lora_put_around_the_embedding_later_is_refused(pair: Pair) -> None:
    model = get_peft_model(pair.load_base(), pair.config(), "thoughts").eval()
    base = model.get_base_model()
    inject_adapter_in_model(LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"]), base, "tuned")
    for call, running in ((next_logits, model), (next_logits, base), (answers, base)):
        with pytest.raises(ValueError, match=r"got peft\.tuners\.lora\.layer\.Embedding around the thoughts"):
            call(running, pair)
    model.unload()
    assert torch.equal(next_logits(base, pair), next_logits(pair.load_base().requires_grad_(False), pair))


@pytest.mark.parametrize("changes", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3]}])
def test_peft_refuses_to_train_or_copy_the_wrapped_embedding(pair: Pair, changes: dict[str, Any]) -> None:
    model = get_peft_model(pair.load_base(), pair.config(), "thoughts").eval()
    expected = next_logits(model, pair)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **changes)
    with pytest.raises(TypeError, match=r"cannot be applied to modules of type .*SoftCoTLayer"):
        inject_adapter_in_model(lora, model.get_base_model(), "tuned")
    torch.testing.assert_close(next_logits(model, pair), expected)  # the LoRA's layers, all zero, may stay behind


def test_a_lora_attached_later_under_the_same_name_is_refused(pair: Pair) -> None:
    model = pair.model()
    base = model.get_base_model()
    inject_adapter_in_model(LORA, base)
    for call, running in ((next_logits, model), (next_logits, base), (answers, base)):
        with pytest.raises(ValueError, match=r"Adapter 'default' must have a name of its own, .*LORA"):
            call(running, pair)


def test_unloading_through_the_lora_s_model_is_not_silent(pair: Pair) -> None:
    tuned = get_peft_model(pair.load_base(), LARGE, "tuned").eval()
    model = get_peft_model(tuned.get_base_model(), pair.config(), "thoughts").eval()
    base = tuned.unload()  # takes every adapter's layers off, of whatever method
    with pytest.raises(RuntimeError, match="input embedding of LlamaForCausalLM must write the thoughts"):
        next_logits(base, pair)
    assert model.unload() is base
    assert torch.equal(next_logits(base, pair), next_logits(pair.load_base().requires_grad_(False), pair))
