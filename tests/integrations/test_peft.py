"""What users do with every PEFT model, done with SoftCoT: it works as the oracle says, or an error says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import last_labels
from helpers import PROJECTION, assistant_of, projection_of
from oracle import Oracle
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    save_as_lora,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from short_prompts import NEW, PROMPTS, answers, next_logits
from tiny_pair import Pair
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from softcot_peft import use_assistant

N = 4
SIZE = 32 * 24 + 32  # of the projection


def loss(model: nn.Module, pair: Pair) -> Tensor:
    """Loss of the last two tokens of every prompt."""
    batch = pair.batch(PROMPTS)
    return model(**batch, labels=last_labels(batch["input_ids"], 2)).loss


def expected(model: nn.Module, pair: Pair, base: Path | None = None) -> list[list[int]]:
    """The oracle's answers, with the projection of the model's default adapter."""
    oracle = Oracle.of(model, base or pair.base, pair.assistant, N)
    return [oracle.generate(row, NEW) for row in pair.rows(PROMPTS)]


@pytest.fixture
def folder(pair: Pair, tmp_path: Path) -> Path:
    pair.model().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# Status


def test_layer_status_tells_of_the_wrapped_embedding(pair: Pair) -> None:
    model = pair.model()
    model.add_adapter("other", pair.config(num_thought_tokens=2))
    for found in (model.get_layer_status(), get_layer_status(model.get_base_model())):
        (status,) = found
        assert status.name.endswith("model.embed_tokens")
        assert status.module_type == "softcot.SoftCoTLayer"
        assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
        assert status.requires_grad == {"default": True, "other": False}
        assert status.available_adapters == ["default", "other"]
        assert status.devices == {"default": ["cpu"], "other": ["cpu"]}


def test_model_status_counts_the_projections_and_nothing_of_the_assistant(pair: Pair) -> None:
    plain = sum(parameter.numel() for parameter in pair.load_base().parameters())
    model = pair.model()
    model.add_adapter("other", pair.config(num_thought_tokens=2))
    next_logits(model, pair)  # the assistant is loaded
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "SoftCoTModel")
    assert status.peft_types == {"default": "SOFTCOT", "other": "SOFTCOT"}
    assert (status.trainable_params, status.total_params) == (SIZE, plain + 2 * SIZE)
    assert (status.num_adapter_layers, status.enabled, status.active_adapters) == (1, True, ["default"])
    model.set_adapter("other")
    with model.disable_adapter():
        disabled = get_model_status(model.get_base_model())
    assert (disabled.enabled, disabled.active_adapters) == (False, ["other"])


def test_trainable_parameters_are_the_active_projection(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    model = pair.model()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert model.get_nb_trainable_parameters() == (SIZE, total)
    model.print_trainable_parameters()
    assert f"trainable params: {SIZE:,} || all params: {total:,}" in capsys.readouterr().out


# Gradients


def test_set_requires_grad_freezes_and_thaws_by_name(pair: Pair) -> None:
    model = pair.model()
    model.add_adapter("other", pair.config(num_thought_tokens=2))

    def trainable() -> set[str]:
        names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
        return {name.split(".")[-2] for name in names}

    assert trainable() == {"default"}
    model.set_requires_grad("default", requires_grad=False)
    assert trainable() == set()
    assert not loss(model, pair).requires_grad
    model.set_requires_grad(["default", "other"])
    assert trainable() == {"default", "other"}
    loss(model, pair).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in projection_of(model).parameters())
    assert all(parameter.grad is None for parameter in projection_of(model, "other").parameters())
    model.set_requires_grad(adapter_names="other", requires_grad=False)
    assert trainable() == {"default"}


# transformers 5.23 renames the argument; earlier versions do not know the new name
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("first", ["checkpointing", "adapter"])
def test_checkpointed_gradients_of_the_projection_are_the_same(pair: Pair, use_reentrant: bool, first: str) -> None:
    plain = pair.model().train()
    loss(plain, pair).backward()
    base = pair.load_base()
    settings = {"use_reentrant": use_reentrant}
    if first == "checkpointing":
        base.gradient_checkpointing_enable(settings)
        base.enable_input_require_grads()
    torch.manual_seed(0)
    model = get_peft_model(base, pair.config()).train()
    if first == "adapter":
        model.gradient_checkpointing_enable(settings)
        model.enable_input_require_grads()
    passes: list[int] = []
    base.model.layers[0].self_attn.register_forward_pre_hook(lambda module, args: passes.append(1))
    with pytest.warns(UserWarning, match="Gradient checkpointing turns two-pass training off"):
        loss(model, pair).backward()
    assert len(passes) == 2  # once more on the way back
    for found, wanted in zip(projection_of(model).parameters(), projection_of(plain).parameters(), strict=True):
        assert wanted.grad.abs().max() > 1e-3
        torch.testing.assert_close(found.grad, wanted.grad, atol=1e-6, rtol=1e-6)


# Loading


def load_into(base: PreTrainedModel, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


def load_beside(base: PreTrainedModel, folder: Path) -> nn.Module:
    config = PeftModel.from_pretrained(base, folder).peft_config["default"]
    model = get_peft_model(base.__class__.from_pretrained(base.name_or_path), config, "other")
    model.load_adapter(folder, "default", low_cpu_mem_usage=True)
    model.set_adapter("default")
    return model


def load_bare(base: PreTrainedModel, folder: Path) -> nn.Module:
    base.load_adapter(str(folder), low_cpu_mem_usage=True)
    return base


def inject_and_fill(base: PreTrainedModel, folder: Path) -> nn.Module:
    config = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name_or_path), folder).peft_config
    inject_adapter_in_model(config["default"], base, low_cpu_mem_usage=True)
    assert projection_of(base).weight.is_meta
    weights = load_file(folder / "adapter_model.safetensors")
    result = set_peft_model_state_dict(base, weights, low_cpu_mem_usage=True)
    assert not result.unexpected_keys
    return base


@pytest.mark.parametrize("load", [load_into, load_beside, load_bare, inject_and_fill])
def test_loading_in_little_memory_keeps_every_bit(
    load: Callable[[PreTrainedModel, Path], nn.Module], pair: Pair, folder: Path
) -> None:
    model = load(pair.load_base(), folder).eval()
    stored = load_file(folder / "adapter_model.safetensors")
    for name, tensor in projection_of(model).state_dict().items():
        assert torch.equal(tensor, stored[f"base_model.model.model.embed_tokens.{PROJECTION}.{name}"])
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert answers(model, pair) == expected(model, pair)


@pytest.mark.parametrize("call", [next_logits, answers])
def test_an_adapter_without_weights_is_refused(call: Callable[[nn.Module, Pair], Any], pair: Pair) -> None:
    model = get_peft_model(pair.load_base(), pair.config(), low_cpu_mem_usage=True).eval()
    with pytest.raises(RuntimeError, match="never loaded") as info:
        call(model, pair)
    assert "`low_cpu_mem_usage=True`" in str(info.value)
    set_peft_model_state_dict(model, get_peft_model_state_dict(pair.model()), low_cpu_mem_usage=True)
    assert answers(model, pair) == expected(model, pair)


def test_state_dicts_of_base_and_adapter_come_apart_and_together(pair: Pair) -> None:
    model, plain = pair.model(), pair.load_base().state_dict()
    base = get_base_model_state_dict(model)
    assert base.keys() == plain.keys()
    assert all(torch.equal(base[name], plain[name]) for name in plain)
    wanted = answers(model, pair)
    adapter = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert answers(model, pair) != wanted
    result = set_base_model_state_dict(model, plain, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    set_peft_model_state_dict(model, adapter)
    assert answers(model, pair) == wanted


# Resized embeddings


def resized(pair: Pair) -> PreTrainedModel:
    torch.manual_seed(3)
    base = pair.load_base()
    base.resize_token_embeddings(base.config.vocab_size + 7, mean_resizing=False)
    return base


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("save_embedding_layers", ["auto", False])
# peft's own, with "auto"
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_a_base_resized_before_attaching_is_saved_and_loaded(
    pair: Pair, tmp_path: Path, save_embedding_layers: bool | str, bare: bool
) -> None:
    base = resized(pair)
    base.save_pretrained(tmp_path / "base")
    pair.tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(base, pair.config()).eval()
    wanted = expected(model, pair, tmp_path / "base")
    assert answers(model, pair) == wanted
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=save_embedding_layers)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    embeddings = {name for name in stored if "softcot_" not in name}
    assert len(embeddings) == (2 if save_embedding_layers == "auto" else 0)

    again = resized(pair)
    if embeddings:  # they are no way to change a base
        other = resized(pair)
        other.get_output_embeddings().weight.data.zero_()
        with pytest.raises(ValueError, match="nothing else"):
            other.load_adapter(str(tmp_path / "adapter"))
    if bare:
        again.load_adapter(str(tmp_path / "adapter"))
    else:
        again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert answers(again.eval(), pair) == wanted


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_saved_embeddings_do_not_load_into_a_base_that_was_not_resized(pair: Pair, tmp_path: Path) -> None:
    get_peft_model(resized(pair), pair.config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its projection and nothing else.*`save_embedding_layers=False`"):
        PeftModel.from_pretrained(pair.load_base(), tmp_path)


def test_resizing_after_attaching_is_refused(pair: Pair) -> None:
    model = pair.model()
    wanted = answers(model, pair)
    with pytest.raises(ValueError, match="resize"):
        model.get_base_model().resize_token_embeddings(400, mean_resizing=False)
    assert answers(model, pair) == wanted


# Assistants


def test_a_tuned_assistant_is_read_and_never_trained(pair: Pair) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=64, init_lora_weights=False, target_modules=["q_proj"])
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(pair.assistant), lora)
    name = use_assistant(tuned, AutoTokenizer.from_pretrained(pair.assistant), name="tuned for habits")
    before = {key: tensor.clone() for key, tensor in tuned.state_dict().items()}
    model = pair.model(assistant_model_name_or_path=name)
    with tuned.disable_adapter():
        untuned = next_logits(model, pair)
        assert answers(model, pair) == expected(model, pair)  # the oracle's assistant is not tuned
    assert not torch.allclose(next_logits(model, pair), untuned, atol=1e-2)
    loss(model.train(), pair).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(tensor, before[key]) for key, tensor in tuned.state_dict().items())
    assert all(parameter.grad is None for parameter in tuned.parameters())
    assert any(parameter.requires_grad for parameter in tuned.parameters())  # still its owner's to train


def test_of_two_models_that_share_an_assistant_one_goes_on_without_the_other(pair: Pair) -> None:
    first, second = pair.model(), pair.model(num_thought_tokens=2)
    shared = {id(assistant_of(m)) for m in (first, second)}
    assert len(shared) == 1
    wanted = answers(first, pair), answers(second, pair)
    assert wanted[0] == expected(first, pair)
    base = first.unload()
    assert answers(second, pair) == wanted[1]
    assert answers(base, pair) == answers(pair.load_base(), pair)
    second.to(torch.bfloat16)  # nor does what one base is cast to reach the assistant of the other
    assert answers(pair.model(), pair) == wanted[0]


# What SoftCoT cannot do


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: m.unmerge_adapter(), ValueError, "nothing to unmerge.*`unload()`"),
        (lambda m: m.add_weighted_adapter(["default"], [1.0], "new"), ValueError, "`add_weighted_adapter` is not"),
        (lambda m: convert_to_lora(m, rank=2), TypeError, "do not support LoRA conversion: .*SoftCoTLayer"),
        (lambda m: save_as_lora("lora", m, rank=2), TypeError, "do not support LoRA conversion: .*SoftCoTLayer"),
        (
            lambda m: m.save_pretrained("converted", path_initial_model_for_weight_conversion="initial"),
            ValueError,
            "not supported for SoftCoTModel",
        ),
    ],
    ids=["unmerge", "weighted", "convert_to_lora", "save_as_lora", "weight_conversion"],
)
def test_what_needs_additive_weights_is_refused(
    call: Callable[[PeftModel], Any],
    kind: type[Exception],
    message: str,
    pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = pair.model()
    before = next_logits(model, pair)
    assert not model.supports_lora_conversion()
    with pytest.raises(kind, match=message.replace("()", r"\(\)")):
        call(model)
    assert torch.equal(next_logits(model, pair), before)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("call", ["forward", "generate", "tuner", "bare"])
def test_adapters_by_row_are_refused(call: str, pair: Pair) -> None:
    model = pair.model()
    model.add_adapter("other", pair.config(num_thought_tokens=2))
    run: dict[str, Callable[..., Any]] = {
        "forward": model,
        "generate": model.generate,
        "tuner": model.base_model,
        "bare": model.get_base_model(),
    }
    with pytest.raises(ValueError, match=r"`adapter_names` is not supported.*`set_adapter`"):
        run[call](**pair.batch(PROMPTS), adapter_names=["default", "other", "__base__"])
    assert answers(model, pair) == expected(model, pair)


@pytest.mark.parametrize(
    "name", ["modules_to_save", "target_modules", "rank_pattern", "layers_to_transform", "trainable_token_indices"]
)
def test_options_of_other_methods_are_no_fields(name: str, pair: Pair) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        pair.config(**{name: ["lm_head"]})
