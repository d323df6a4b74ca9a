"""Bases and assistants of every dtype and quantisation: soft thoughts are computed in the projection's own dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from batches import last_labels, next_logits
from helpers import PROJECTION, projection_of
from oracle import Oracle
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from short_prompts import NEW, PROMPTS, answers
from tiny_pair import Pair
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

N = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def written(model: nn.Module, pair: Pair, text: str) -> Tensor:
    """What the base reads at the thought positions of one prompt, `(N, H_base)`."""
    seen: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    next_logits(model, pair.batch([text]))
    hook.remove()
    return seen[0][0, -N:]


def half_pair(pair: Pair, folder: Path, dtype: torch.dtype) -> Pair:
    """The pair with a base that is stored in a dtype."""
    pair.load_base().to(dtype).save_pretrained(folder)
    pair.tokenizer.save_pretrained(folder)
    return replace(pair, base=folder)


@torch.no_grad()
def projected(oracle: Oracle, pair: Pair, text: str, dtype: torch.dtype) -> Tensor:
    """`W t + b` in a dtype, from the oracle's assistant as it was loaded."""
    [row] = pair.rows([text])
    ids = torch.tensor([oracle.assistant_ids(row) + [oracle.assistant_tokenizer.unk_token_id] * N])
    hidden = oracle.assistant(ids, output_hidden_states=True).hidden_states[-1][0, -N:]
    return nn.functional.linear(hidden.to(dtype), oracle.weight.to(dtype), oracle.bias.to(dtype))


@pytest.mark.parametrize("assistant_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES)
def test_thoughts_are_projected_in_float32_whatever_base_and_assistant_are(
    pair: Pair, tmp_path: Path, base_dtype: str, assistant_dtype: str
) -> None:
    pair = half_pair(pair, tmp_path, DTYPES[base_dtype])
    model = pair.model(assistant_dtype=assistant_dtype)
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    oracle.assistant = AutoModelForCausalLM.from_pretrained(pair.assistant, dtype=DTYPES[assistant_dtype]).eval()
    for text in PROMPTS:
        found = written(model, pair, text)
        assert found.dtype == DTYPES[base_dtype]  # only what is written is rounded
        expected = projected(oracle, pair, text, torch.float32)
        torch.testing.assert_close(found, expected.to(DTYPES[base_dtype]), atol=1e-5, rtol=1e-5)
    assert {parameter.dtype for parameter in projection_of(model).parameters()} == {torch.float32}
    others = {parameter.dtype for name, parameter in model.named_parameters() if "softcot_" not in name}
    assert others == {DTYPES[base_dtype]}
    logits = next_logits(model, pair.batch(PROMPTS))
    assert logits.dtype == DTYPES[base_dtype]
    assert logits.isfinite().all()
    assert len(answers(model, pair)) == len(PROMPTS)
    batch = pair.batch(PROMPTS)
    model.train()(**batch, labels=last_labels(batch["input_ids"], 2)).loss.backward()
    for parameter in projection_of(model).parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


# `autocast_adapter_dtype`


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter", "from_pretrained", "load_adapter"])
def test_the_adapter_s_dtype_is_float32_or_as_asked_the_base_s(
    pair: Pair, tmp_path: Path, way: str, autocast: bool
) -> None:
    pair = half_pair(pair, tmp_path / "base", torch.bfloat16)
    pair.model().save_pretrained(tmp_path / "adapter")

    def make() -> tuple[PeftModel, str]:
        base, folder, option = pair.load_base(), tmp_path / "adapter", {"autocast_adapter_dtype": autocast}
        if way == "get_peft_model":
            return get_peft_model(base, pair.config(), **option), "default"
        if way == "from_pretrained":
            return PeftModel.from_pretrained(base, folder, **option), "default"
        model = get_peft_model(base, pair.config())
        if way == "add_adapter":
            model.add_adapter("new", pair.config(), **option)
        else:
            model.load_adapter(folder, "new", **option)
        model.set_adapter("new")
        return model, "new"

    model, name = make()
    projection = projection_of(model.eval(), name)
    dtype = torch.float32 if autocast else torch.bfloat16
    assert {parameter.dtype for parameter in projection.parameters()} == {dtype}
    oracle = Oracle(pair.base, pair.assistant, projection.weight.detach(), projection.bias.detach(), N)
    expected = projected(oracle, pair, PROMPTS[0], dtype)
    torch.testing.assert_close(written(model, pair, PROMPTS[0]), expected.to(torch.bfloat16))
    if way in ("from_pretrained", "load_adapter"):
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        [weight] = [tensor for key, tensor in stored.items() if key.endswith("weight")]
        assert torch.equal(projection.weight, weight.to(dtype))


def test_an_adapter_saved_in_bfloat16_loads_to_the_same_values(pair: Pair, tmp_path: Path) -> None:
    pair = half_pair(pair, tmp_path / "base", torch.bfloat16)
    torch.manual_seed(0)
    model = get_peft_model(pair.load_base(), pair.config(), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path / "adapter")
    assert {t.dtype for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    bare = pair.load_base()
    bare.load_adapter(str(tmp_path / "adapter"))
    for loaded in (PeftModel.from_pretrained(pair.load_base(), tmp_path / "adapter"), bare):
        assert torch.equal(projection_of(loaded).weight, projection_of(model).weight.float())


# Quantised bases


QUANTISED = {
    "8bit": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


@pytest.fixture
def quantisable(pair: Pair, tmp_path: Path) -> Pair:
    """The pair with a base of sizes that the kernels take: multiples of 32."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = LlamaConfig(
        vocab_size=len(pair.tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "quantisable")
    pair.tokenizer.save_pretrained(tmp_path / "quantisable")
    return replace(pair, base=tmp_path / "quantisable")


def load_quantised(pair: Pair, kind: str, device: str) -> PreTrainedModel:
    config = BitsAndBytesConfig(**QUANTISED[kind])
    return AutoModelForCausalLM.from_pretrained(
        pair.base, quantization_config=config, device_map={"": device}, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", QUANTISED)
# bitsandbytes' own: of its 8-bit matmul on every call, and of its CPU kernels
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.filterwarnings("ignore:.*bitsandbytes.*:UserWarning")
def test_a_quantised_base_trains_and_answers_as_the_oracle_over_it(
    kind: str, device: str, quantisable: Pair, tmp_path: Path
) -> None:
    pair = quantisable
    torch.manual_seed(0)
    base = prepare_model_for_kbit_training(load_quantised(pair, kind, device), use_gradient_checkpointing=False)
    assert type(base.model.layers[0].self_attn.q_proj).__module__.startswith("bitsandbytes")
    model = get_peft_model(base, pair.config()).eval()
    assert {parameter.dtype for parameter in projection_of(model).parameters()} == {torch.float32}

    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    oracle.base, oracle.assistant = (
        load_quantised(pair, kind, device).requires_grad_(False),
        oracle.assistant.to(device),
    )
    for name in ("weight", "bias"):
        setattr(oracle, name, getattr(oracle, name).requires_grad_())
    (prompt,), (response,) = pair.rows([PROMPTS[0]]), pair.rows([" They have twenty eight legs."])
    oracle.base.train()  # 8-bit layers round in another way
    with torch.device(device):
        expected = oracle.loss(prompt, response)
    expected.backward()
    ids = torch.tensor([prompt + response], device=device)
    found = model.train()(input_ids=ids, labels=torch.tensor([[-100] * len(prompt) + response], device=device)).loss
    found.backward()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for name in ("weight", "bias"):
        gradient = getattr(oracle, name).grad
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(
            getattr(projection_of(model), name).grad.cpu(), gradient.cpu(), atol=1e-4, rtol=1e-2
        )
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name for name, _ in model.named_parameters()} - frozen == {
        f"base_model.model.model.embed_tokens.{PROJECTION}.default.{name}" for name in ("weight", "bias")
    }

    model.eval()
    oracle.base.eval()
    for row in pair.rows(PROMPTS):
        with torch.no_grad(), torch.device(device):
            wanted = oracle.logits(row, [])[-1:]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row], device=device), logits_to_keep=1).logits[:, -1]
        torch.testing.assert_close(logits, wanted, atol=1e-3, rtol=1e-3)
    batch = {name: tensor.to(device) for name, tensor in pair.batch(PROMPTS).items()}
    generated = model.generate(**batch, max_new_tokens=NEW)[:, batch["input_ids"].shape[1] :].tolist()
    if kind != "8bit":  # whose outlier columns are shared by all tokens of a batch, so that batched is not single
        for row, tokens in zip(pair.rows(PROMPTS), generated, strict=True):
            with torch.device(device):
                wanted = oracle.generate(row, NEW)
            assert tokens[: len(wanted)] == wanted
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_quantised(pair, kind, device), tmp_path / "adapter").eval()
    assert loaded.generate(**batch, max_new_tokens=NEW)[:, batch["input_ids"].shape[1] :].tolist() == generated
