"""Several adapters on one base, each with its own N and assistant: chosen, disabled, deleted, unloaded, copied."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import generated
from helpers import break_assistants, projection_of, projections_of, readers_of
from oracle import Oracle
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn
from transformers import PreTrainedModel

NEW = 6
PROMPTS = [QUESTIONS[1], QUESTIONS[0], "Seven?"]
Answers = list[list[int]]

# PEFT's own, when the active adapter is deleted and another one takes its place
DELETED = "ignore:Adapter .* was active which is now deleted:UserWarning"


@dataclass
class Family:
    """Three adapters of one base, with three assistants and three N, and what each of them answers.

    Args:
        folders: A saved adapter, by name.
        configs: What makes its config, by name.
        expected: The oracle's answers to PROMPTS, by adapter; `"base"` for the plain base.
    """

    folders: dict[str, Path]
    configs: dict[str, dict[str, object]]
    expected: dict[str, Answers]


@pytest.fixture(scope="module")
def family(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("family")
    assistants = {"one": pair.assistant, "two": pair.twin, "three": pair.chat_assistant}
    numbers = {"one": 4, "two": 2, "three": 7}
    torch.manual_seed(0)
    configs: dict[str, dict[str, object]] = {
        name: {"assistant_model_name_or_path": str(assistants[name]), "num_thought_tokens": numbers[name]}
        for name in assistants
    }
    base = pair.load_base()
    expected = {"base": answers(base, pair)}
    folders = {}
    for name, changes in configs.items():
        model = get_peft_model(pair.load_base(), pair.config(**changes))
        folders[name] = root / name
        model.save_pretrained(folders[name])
        oracle = Oracle.of(model, pair.base, assistants[name], numbers[name], same_ids=name == "two")
        expected[name] = [oracle.generate(row, NEW) for row in pair.rows(PROMPTS)]
    assert len({str(found) for found in expected.values()}) == 4  # so that a mistaken adapter is seen
    return Family(folders, configs, expected)


@pytest.fixture
def model(pair: Pair, family: Family) -> PeftModel:
    """A PeftModel with the three adapters, the first one active."""
    model = PeftModel.from_pretrained(pair.load_base(), family.folders["one"], adapter_name="one")
    for name in ("two", "three"):
        model.load_adapter(family.folders[name], name)
    return model.eval()


@pytest.fixture
def bare(pair: Pair, family: Family) -> PreTrainedModel:
    """A bare base with the three adapters, loaded with transformers' API, the last one active."""
    base = pair.load_base()
    for name, folder in family.folders.items():
        base.load_adapter(str(folder), name)
    base.set_adapter("three")
    return base


def answers(model: nn.Module, pair: Pair) -> Answers:
    """The new tokens for PROMPTS, up to the first EOS as the oracle has them."""
    return generated(model, pair.batch(PROMPTS), NEW)


def logits(model: nn.Module, pair: Pair, keep: int = 0) -> Tensor:
    """Logits of all rows, or of the last `keep` ones, which alone have read thoughts that follow the prompt."""
    with torch.no_grad():
        return model(**pair.batch(PROMPTS), logits_to_keep=keep).logits


# Each adapter is its own


@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_each_adapter_answers_as_its_oracle(pair: Pair, family: Family, model: PeftModel, name: str) -> None:
    model.set_adapter(name)
    assert model.active_adapters == [name]
    assert answers(model, pair) == family.expected[name]


def test_adapters_can_be_switched_back_and_forth(pair: Pair, family: Family, model: PeftModel) -> None:
    for name in ("one", "three", "two", "one", "three"):
        model.set_adapter(name)
        assert answers(model, pair) == family.expected[name]


def test_adding_an_adapter_leaves_the_active_one_in_place(pair: Pair, family: Family) -> None:
    model = PeftModel.from_pretrained(pair.load_base(), family.folders["one"], adapter_name="one").eval()
    before = logits(model, pair, keep=1)
    torch.manual_seed(1)
    model.add_adapter("fresh", pair.config(**family.configs["two"]))
    model.load_adapter(family.folders["two"], "two")
    assert model.active_adapters == ["one"]
    assert torch.equal(logits(model, pair, keep=1), before)
    model.set_adapter("fresh")
    assert answers(model, pair) not in family.expected.values()


def test_only_the_active_adapter_trains(pair: Pair, family: Family) -> None:
    model = get_peft_model(pair.load_base(), pair.config(**family.configs["one"]), adapter_name="one")
    model.add_adapter("two", pair.config(**family.configs["two"]))
    for name, other in (("one", "two"), ("two", "one")):
        model.set_adapter(name)
        model.zero_grad()
        batch = pair.batch(PROMPTS)
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -1] = 9
        model.train()(**batch, labels=labels).loss.backward()
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert {key.split(".")[-2] for key in trained} == {name}
        projection = projections_of(model)
        assert all(parameter.grad.abs().sum() > 0 for parameter in projection[name].parameters())
        assert all(parameter.grad is None for parameter in projection[other].parameters())


def test_saving_writes_each_adapter_with_its_own_config(
    pair: Pair, family: Family, model: PeftModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    for name in family.folders:
        loaded = PeftModel.from_pretrained(pair.load_base(), tmp_path / name).eval()
        config = loaded.peft_config["default"]
        assert config.num_thought_tokens == family.configs[name]["num_thought_tokens"]
        assert answers(loaded, pair) == family.expected[name]


# Disabled, deleted, unloaded


def test_disabled_adapters_leave_the_base_bit_for_bit(pair: Pair, family: Family, model: PeftModel) -> None:
    base = pair.load_base()
    with model.disable_adapter():
        assert torch.equal(logits(model, pair), logits(base, pair))
        assert answers(model, pair) == family.expected["base"]
        model.set_adapter("two")
    assert answers(model, pair) == family.expected["two"]


def test_disabled_adapters_do_not_run_the_assistant(
    pair: Pair, model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_assistants(monkeypatch, AssertionError("the assistant ran"))
    with model.disable_adapter():
        logits(model, pair)
        answers(model, pair)
    with pytest.raises(AssertionError, match="the assistant ran"):
        logits(model, pair, keep=1)


def test_the_base_ignores_the_assistant_s_input_while_adapters_are_disabled(pair: Pair, model: PeftModel) -> None:
    own = {name: torch.ones(3, 9, dtype=torch.long) for name in ("assistant_input_ids", "assistant_attention_mask")}
    seen: set[str] = set()
    base = model.get_base_model()
    base.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with model.disable_adapter():
        expected = logits(model, pair)
        assert torch.equal(model(**pair.batch(PROMPTS), **own).logits, expected)
        generated = model.generate(**pair.batch(PROMPTS), **own, max_new_tokens=NEW)
        assert torch.equal(generated, model.generate(**pair.batch(PROMPTS), max_new_tokens=NEW))
    assert "input_ids" in seen
    assert not seen & own.keys()


def test_deleting_an_inactive_adapter_changes_nothing_else(pair: Pair, family: Family, model: PeftModel) -> None:
    model.delete_adapter("two")
    assert set(model.peft_config) == {"one", "three"}
    assert not any(".two." in name for name in model.state_dict())
    assert set(readers_of(model)) == {"one", "three"}
    for name in ("one", "three"):
        model.set_adapter(name)
        assert answers(model, pair) == family.expected[name]


@pytest.mark.filterwarnings(DELETED)
def test_deleting_the_active_adapter_makes_another_one_active(pair: Pair, family: Family, model: PeftModel) -> None:
    model.delete_adapter("one")
    (active,) = model.active_adapters
    assert active in ("two", "three")
    assert answers(model, pair) == family.expected[active]


@pytest.mark.filterwarnings(DELETED)
def test_the_base_is_left_when_the_last_adapter_is_deleted(pair: Pair, family: Family, model: PeftModel) -> None:
    for name in ("one", "two", "three"):
        model.delete_adapter(name)
    base = model.base_model.model  # a PeftModel without adapters does not run, whatever its method (peft 0.21)
    assert torch.equal(logits(base, pair), logits(pair.load_base(), pair))
    assert answers(base, pair) == family.expected["base"]
    model.load_adapter(family.folders["two"], "again")
    model.set_adapter("again")
    assert answers(model, pair) == family.expected["two"]


@pytest.mark.parametrize("adapters", [1, 3])
def test_unloading_gives_the_plain_base_back(pair: Pair, family: Family, adapters: int) -> None:
    base = pair.load_base()
    before = shape_of(base)
    model = get_peft_model(base, pair.config(), adapter_name="one")
    for name in ("two", "three")[: adapters - 1]:
        model.add_adapter(name, pair.config(**family.configs[name]))
    answers(model, pair)
    assert shape_of(base) != before
    unloaded = model.unload()
    assert unloaded is base
    assert shape_of(base) == before
    assert torch.equal(logits(base, pair), logits(pair.load_base(), pair))
    assert answers(base, pair) == family.expected["base"]


def shape_of(model: nn.Module) -> dict[str, Any]:
    """All that an adapter could leave behind on a base, besides frozen weights."""
    hooks = [name for name in vars(model) if name.startswith("_") and name.endswith("hooks")]
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "hooks": {name: [list(vars(module)[hook]) for hook in hooks] for name, module in model.named_modules()},
        "states": list(model.state_dict()),
        "generate": model.generate.__func__ if hasattr(model.generate, "__func__") else model.generate,
    }


def test_unloading_twice_is_harmless(pair: Pair, family: Family, model: PeftModel) -> None:
    base = model.unload()
    assert model.unload() is base
    assert answers(base, pair) == family.expected["base"]


def test_an_unloaded_base_takes_adapters_again(pair: Pair, family: Family, model: PeftModel) -> None:
    base = model.unload()
    again = PeftModel.from_pretrained(base, family.folders["two"]).eval()
    assert answers(again, pair) == family.expected["two"]


def test_unloading_keeps_what_others_put_on_the_base(pair: Pair, family: Family) -> None:
    base = pair.load_base()
    calls: list[str] = []
    base.register_forward_pre_hook(lambda module, args: calls.append("hook"))
    original = base.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append("generate")
        return original(*args, **kwargs)

    base.generate = generate
    model = PeftModel.from_pretrained(base, family.folders["one"]).eval()
    assert answers(model, pair) == family.expected["one"]
    assert calls[0] == "generate"
    assert calls.count("hook") == NEW
    model.unload()
    assert base.generate is generate
    calls.clear()
    assert answers(base, pair) == family.expected["base"]
    assert calls.count("hook") == NEW


# Through transformers' own API


@pytest.mark.parametrize("name", ["one", "two", "three"])
def test_a_bare_base_answers_with_the_adapter_that_is_set(
    pair: Pair, family: Family, bare: PreTrainedModel, name: str
) -> None:
    bare.set_adapter(name)
    assert bare.active_adapters() == [name]
    assert answers(bare, pair) == family.expected[name]


def test_loading_a_second_adapter_keeps_the_first_one_s_weights(pair: Pair, family: Family) -> None:
    base = pair.load_base()
    base.load_adapter(str(family.folders["one"]), "one")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    base.load_adapter(str(family.folders["two"]), "two")
    after = base.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_bare_base_s_adapters_can_be_disabled_and_enabled(pair: Pair, family: Family, bare: PreTrainedModel) -> None:
    bare.disable_adapters()
    assert torch.equal(logits(bare, pair), logits(pair.load_base(), pair))
    assert answers(bare, pair) == family.expected["base"]
    bare.enable_adapters()
    assert answers(bare, pair) == family.expected["three"]


@pytest.mark.filterwarnings(DELETED)
def test_a_bare_base_s_adapters_can_be_deleted(pair: Pair, family: Family, bare: PreTrainedModel) -> None:
    bare.delete_adapter("two")
    assert answers(bare, pair) == family.expected["three"]
    bare.delete_adapter("three")
    assert answers(bare, pair) == family.expected["one"]
    bare.delete_adapter("one")
    assert torch.equal(logits(bare, pair), logits(pair.load_base(), pair))
    assert answers(bare, pair) == family.expected["base"]
    bare.load_adapter(str(family.folders["two"]), "again")
    assert answers(bare, pair) == family.expected["two"]


def test_a_fresh_adapter_can_be_added_to_a_bare_base(pair: Pair, family: Family, bare: PreTrainedModel) -> None:
    torch.manual_seed(1)
    bare.add_adapter(pair.config(**family.configs["one"]), "fresh")
    assert bare.active_adapters() == ["fresh"]
    assert answers(bare, pair) not in family.expected.values()
    bare.set_adapter("one")
    assert answers(bare, pair) == family.expected["one"]


def test_a_lora_can_be_added_to_a_bare_base(pair: Pair) -> None:
    """Of no method of ours: where transformers refuses this, the tests of bare bases are skipped."""
    base = pair.load_base()
    base.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    assert base.active_adapters() == ["lora"]


def test_a_lora_of_the_base_can_stand_beside(pair: Pair, family: Family, tmp_path: Path) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = get_peft_model(pair.load_base(), lora)
    tuned.save_pretrained(tmp_path / "lora")
    lora_alone = answers(tuned.eval(), pair)
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    pair.tokenizer.save_pretrained(tmp_path / "merged")
    softcot = PeftModel.from_pretrained(pair.load_base(), family.folders["one"])
    oracle = Oracle.of(softcot, tmp_path / "merged", pair.assistant, 4)
    both = [oracle.generate(row, NEW) for row in pair.rows(PROMPTS)]

    base = pair.load_base()
    base.load_adapter(str(family.folders["one"]), "one")
    base.load_adapter(str(tmp_path / "lora"), "lora")
    for names, expected in ((["one"], family.expected["one"]), (["lora"], lora_alone), (["lora", "one"], both)):
        base.set_adapter(names)
        assert answers(base, pair) == expected


# Copies


@pytest.mark.parametrize("make", [lambda model: model, lambda model: model.get_base_model()], ids=["peft", "bare"])
def test_a_copy_answers_the_same_and_shares_the_assistants(
    pair: Pair, family: Family, model: PeftModel, make: Callable[[PeftModel], nn.Module]
) -> None:
    original = make(model)
    copied = copy.deepcopy(original)
    assert answers(copied, pair) == family.expected["one"]
    torch.testing.assert_close(logits(copied, pair, keep=1), logits(original, pair, keep=1))
    readers, copies = readers_of(original), readers_of(copied)
    assert copies is not readers
    assert all(copies[name].assistant is readers[name].assistant for name in family.folders)


def test_a_copy_is_a_model_of_its_own(pair: Pair, family: Family, model: PeftModel) -> None:
    copied = copy.deepcopy(model)
    copied.set_adapter("two")
    assert answers(model, pair) == family.expected["one"]
    assert answers(copied, pair) == family.expected["two"]
    with torch.no_grad():
        for parameter in projection_of(copied, "two").parameters():
            parameter.zero_()
    model.set_adapter("two")
    assert answers(model, pair) == family.expected["two"]
    assert answers(copied, pair) != family.expected["two"]
    plain = copied.unload()
    assert answers(plain, pair) == family.expected["base"]
    assert not plain._forward_hooks
    assert not plain._forward_pre_hooks
    assert answers(model, pair) == family.expected["two"]


def test_a_copy_of_a_disabled_model_is_disabled(pair: Pair, family: Family, bare: PreTrainedModel) -> None:
    bare.disable_adapters()
    copied = copy.deepcopy(bare)
    bare.enable_adapters()
    assert answers(copied, pair) == family.expected["base"]
    copied.enable_adapters()
    assert answers(copied, pair) == family.expected["three"]
