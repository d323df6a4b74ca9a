"""`Embedder`: what `prompt_embeds` makes, bit for bit, without the base's layers."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import backbone_of, forget_given, loaded_assistants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_pair import QUESTIONS, RUN, Pair
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    PreTrainedModel,
)

from softcot_peft import prompt_embeds, use_assistant
from softcot_peft.serving import Embedder

N, K = 4, 3
MARKER = "\nAnswer:"
KINDS: dict[str, dict[str, Any]] = {
    "end of the prompt": {},
    "run": RUN,
    "marker": {"response_marker": MARKER},
    "other number": {"inference_num_thought_tokens": 2},
    "chains": {"num_chains": K, "chain_init": "trained"},
    "fixed chains": {"num_chains": K, "chain_init": "fixed"},
}
SMALL: dict[str, Any] = {
    "vocab_size": 330,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "pad_token_id": 0,
}


def texts(kind: str) -> list[str]:
    end = {"run": "<thought>" * N + " so", "marker": MARKER}.get(kind, "")
    return [question + end for question in QUESTIONS]


def saved(pair: Pair, folder: Path, **fields: Any) -> Path:
    pair.model(**fields).save_pretrained(folder)
    return folder


def loaded(base: Path, adapter: Path, **options: Any) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **options), adapter).eval()


def check_same(embedder: Embedder, model: nn.Module, batch: dict[str, Tensor], **options: Any) -> None:
    found, expected = embedder(**batch, **options), prompt_embeds(model, **batch, **options)
    assert len(found) == len(expected) > 0
    for row, other in zip(found, expected, strict=True):
        assert row.dtype == other.dtype
        assert torch.equal(row, other)


def in_memory(embedder: Embedder) -> dict[str, Tensor]:
    """Everything with values, by name."""
    tensors = {**dict(embedder.model.named_parameters()), **dict(embedder.model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if tensor.device.type != "meta"}


@pytest.fixture(scope="module")
def adapter(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(pair, tmp_path_factory.mktemp("adapter"))


def copy_of(pair: Pair, folder: Path, model: PreTrainedModel | None = None, **options: Any) -> Path:
    """A base in a folder of its own, with the tokenizer of the pair's."""
    (model or pair.load_base()).save_pretrained(folder, **options)
    pair.tokenizer.save_pretrained(folder)
    return folder


# The same tensors


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_makes_what_prompt_embeds_makes(pair: Pair, tmp_path: Path, kind: str, side: str) -> None:
    folder = saved(pair, tmp_path, **KINDS[kind])
    embedder, model, batch = Embedder.from_pretrained(folder), loaded(pair.base, folder), pair.batch(texts(kind), side)
    assert embedder.config.num_thought_tokens == N
    check_same(embedder, model, batch)
    check_same(embedder, model, {"input_ids": batch["input_ids"]})
    own = torch.full((len(QUESTIONS), 9), 7) + torch.arange(len(QUESTIONS))[:, None]
    check_same(embedder, model, batch, assistant_input_ids=own, assistant_attention_mask=torch.ones_like(own))
    if "chains" in kind:
        check_same(embedder, model, batch, chains=[2, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_the_callers_else_the_bases(
    pair: Pair, tmp_path: Path, adapter: Path, dtype: torch.dtype
) -> None:
    given = Embedder.from_pretrained(adapter, base=pair.base, dtype=dtype)
    check_same(given, loaded(pair.base, adapter, dtype=dtype), pair.batch(QUESTIONS))
    base = copy_of(pair, tmp_path, pair.load_base().to(dtype))
    for says in (True, False):
        if not says:
            config = json.loads((base / "config.json").read_text())
            (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "dtype" not in k}))
        check_same(Embedder.from_pretrained(adapter, base=base), loaded(base, adapter), pair.batch(QUESTIONS))


def test_an_embedding_that_scales_has_its_scale(pair: Pair, tmp_path: Path) -> None:
    base = copy_of(pair, tmp_path / "base", AutoModelForCausalLM.from_config(Gemma3TextConfig(**SMALL)))
    for dtype in (torch.float32, torch.bfloat16):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), pair.config())
        model.save_pretrained(tmp_path / "adapter")
        embedder = Embedder.from_pretrained(tmp_path / "adapter", dtype=dtype)
        check_same(embedder, model.eval(), pair.batch(QUESTIONS))


def test_a_file_of_the_backbone_alone(pair: Pair, tmp_path: Path) -> None:
    twin = AutoModelForCausalLM.from_pretrained(pair.twin)
    base = copy_of(pair, tmp_path / "base", twin.transformer)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    assert "wte.weight" in load_file(base / "model.safetensors")
    get_peft_model(twin, pair.config()).save_pretrained(tmp_path / "adapter")
    embedder = Embedder.from_pretrained(tmp_path / "adapter", base=base)
    check_same(embedder, loaded(base, tmp_path / "adapter"), pair.batch(QUESTIONS))


def test_an_assistant_that_was_given(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_given(monkeypatch)
    assistant = AutoModelForCausalLM.from_pretrained(pair.twin)
    use_assistant(assistant, pair.tokenizer, name="given")
    folder = saved(pair, tmp_path, assistant_model_name_or_path="given")
    embedder = Embedder.from_pretrained(folder)
    check_same(embedder, loaded(pair.base, folder), pair.batch(QUESTIONS))
    assert backbone_of(embedder.model) is assistant.transformer


def test_an_adapter_that_was_saved_with_the_bases_embeddings(pair: Pair, tmp_path: Path) -> None:
    model = pair.model()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(name.endswith("lm_head.weight") for name in load_file(tmp_path / "adapter_model.safetensors"))
    check_same(Embedder.from_pretrained(tmp_path), model, pair.batch(QUESTIONS))


# What is loaded


def sharded(pair: Pair, folder: Path) -> tuple[Path, str]:
    """A base in several files, and the one with the embedding matrix."""
    copy_of(pair, folder, max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    return folder, index["model.embed_tokens.weight"]


def test_no_layer_of_the_base_is_in_memory(pair: Pair, adapter: Path) -> None:
    embedder = Embedder.from_pretrained(adapter)
    embedder(**pair.batch(QUESTIONS))
    names = {name.partition("embed_tokens.")[2] for name in in_memory(embedder)}
    assert names == {"base_layer.weight", "softcot_projection.default.weight", "softcot_projection.default.bias"}
    assert not any(tensor.requires_grad for tensor in in_memory(embedder).values())


def test_one_file_of_a_sharded_base_is_enough(pair: Pair, tmp_path: Path, adapter: Path) -> None:
    base, needed = sharded(pair, tmp_path)
    model = loaded(base, adapter)
    for file in base.glob("*.safetensors"):
        if file.name != needed:
            file.unlink()
    check_same(Embedder.from_pretrained(adapter, base=base), model, pair.batch(QUESTIONS))


@pytest.mark.parametrize("named", [True, False], ids=["named", "in the config"])
def test_of_a_base_on_the_hub_only_what_is_needed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """A cache in which nothing else is, and no network."""
    repository, commit = tmp_path / "models--org--base", "a" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text(commit, encoding="utf-8")
    (repository / "refs" / "main").write_text(commit if named else "b" * 40, encoding="utf-8")
    base, needed = sharded(pair, repository / "snapshots" / commit)
    adapter = saved(pair, tmp_path / "adapter")
    model = loaded(base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    changes = {"base_model_name_or_path": "org/base", "revision": "v1"}
    (adapter / "adapter_config.json").write_text(json.dumps(config if named else config | changes))
    for file in [*base.glob("*.safetensors"), base / "generation_config.json"]:
        if file.name != needed:
            file.unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    embedder = Embedder.from_pretrained(adapter, base="org/base" if named else None)
    check_same(embedder, model, pair.batch(QUESTIONS))


def test_embedders_share_the_matrix_and_the_assistant(pair: Pair, tmp_path: Path, adapter: Path) -> None:
    loaded_assistants().clear()
    other = saved(pair, tmp_path, num_thought_tokens=2)
    first, second = (Embedder.from_pretrained(folder) for folder in (adapter, other))
    third = Embedder.from_pretrained(adapter, dtype=torch.bfloat16)
    matrices = [embedder.model.get_input_embeddings().weight for embedder in (first, second, third)]
    assert matrices[0] is matrices[1] is not matrices[2]
    assert len(second(**pair.batch(QUESTIONS[:1]))[0]) == len(first(**pair.batch(QUESTIONS[:1]))[0]) - 2
    assert backbone_of(first.model) is backbone_of(second.model)


def test_threads_share_an_embedder(pair: Pair, adapter: Path) -> None:
    loaded_assistants().clear()
    embedder, batches = Embedder.from_pretrained(adapter), [pair.batch([text]) for text in QUESTIONS]
    expected = [prompt_embeds(loaded(pair.base, adapter), **batch)[0] for batch in batches]
    found: dict[int, list[Tensor]] = {}
    start = threading.Barrier(len(batches))

    def embed(number: int) -> None:
        start.wait()
        found[number] = [embedder(**batches[number])[0] for _ in range(8)]

    threads = [threading.Thread(target=embed, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(row, expected[number]) for number, rows in found.items() for row in rows)
    assert len(found) == len(batches)


# What cannot be


def test_an_adapter_that_reads_with_the_base_needs_it(pair: Pair, tmp_path: Path) -> None:
    folder = saved(pair, tmp_path, thought_source="base", assistant_model_name_or_path=None)
    with pytest.raises(ValueError, match="must read with an assistant, got `thought_source='base'`"):
        Embedder.from_pretrained(folder)


def test_adapters_of_other_methods_are_refused(pair: Pair, tmp_path: Path) -> None:
    get_peft_model(pair.load_base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must be a SoftCoT adapter, got one of .*LORA"):
        Embedder.from_pretrained(tmp_path)


def test_the_base_must_be_known_and_there(pair: Pair, tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(
        ValueError, match=r"(?s)`base` must be the Hub id or folder of a decoder LM, got 'nowhere'.*/nowhere"
    ):
        Embedder.from_pretrained(adapter, base="nowhere")
    nameless = Path(shutil.copytree(adapter, tmp_path / "nameless"))
    config = json.loads((nameless / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (nameless / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`base` must be given, since the adapter's config names none"):
        Embedder.from_pretrained(nameless)


def test_a_base_of_another_width_is_refused(pair: Pair, adapter: Path) -> None:
    with pytest.raises(ValueError, match="to base hidden size 32, but this assistant has 24 and this base 20"):
        Embedder.from_pretrained(adapter, base=pair.twin)


def test_a_base_that_cannot_be_tried_is_warned_about(pair: Pair, tmp_path: Path) -> None:
    """GPT-2 looks for padding in the ids, if it has a padding id."""
    twin = AutoModelForCausalLM.from_pretrained(pair.twin)
    twin.config.pad_token_id = 0
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(copy_of(pair, tmp_path, twin)), pair.config())
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="Whether GPT2LMHeadModel computes the same from embeddings as from ids can"):
        embedder = Embedder.from_pretrained(tmp_path / "adapter")
    check_same(embedder, model.eval(), pair.batch(QUESTIONS))


def test_weights_that_are_no_safetensors_are_refused(pair: Pair, tmp_path: Path, adapter: Path) -> None:
    base = copy_of(pair, tmp_path)
    weights = load_file(base / "model.safetensors")
    torch.save(weights, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights must be safetensors .* has neither model.safetensors nor"):
        Embedder.from_pretrained(adapter, base=base)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.embed_tokens.weight": None}, "must hold 'model.embed_tokens.weight', or one other name that ends in"),
        (
            {
                "model.embed_tokens.weight": None,
                "a.embed_tokens.weight": torch.zeros(2),
                "b.embed_tokens.weight": torch.zeros(2),
            },
            "but hold \\['a.embed_tokens.weight', 'b.embed_tokens.weight'\\]",
        ),
        ({"model.embed_tokens.weight": torch.zeros(7, 32)}, "must have the shape \\(\\d+, 32\\) .* got \\(7, 32\\)"),
        ({"model.embed_tokens.weight": "packed"}, "hold floating-point numbers, got .*torch.uint8. Packed weights"),
    ],
    ids=["missing", "ambiguous", "shape", "packed"],
)
def test_files_without_the_matrix_are_refused(
    pair: Pair, tmp_path: Path, adapter: Path, changes: dict[str, Any], words: str
) -> None:
    base = copy_of(pair, tmp_path)
    weights = load_file(base / "model.safetensors")
    for name, value in changes.items():
        found = weights.pop(name, None)
        if value is not None:
            weights[name] = found.to(torch.uint8) if isinstance(value, str) else value
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        Embedder.from_pretrained(adapter, base=base)


def test_an_index_that_leads_out_of_the_folder_is_refused(pair: Pair, tmp_path: Path, adapter: Path) -> None:
    base, _ = sharded(pair, tmp_path / "base")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.embed_tokens.weight"] = "../elsewhere.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="leads out of its folder"):
        Embedder.from_pretrained(adapter, base=base)


def test_a_base_that_reads_ids_as_well_is_refused_without_its_weights(
    pair: Pair, tmp_path: Path, adapter: Path
) -> None:
    changes = {"vocab_size_per_layer_input": 330, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0]}
    config = Gemma3nTextConfig(**SMALL, **changes, **layers, laurel_rank=8)
    base = copy_of(pair, tmp_path, AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match=r"reads ids as well: only ids reach its 'model.embed_tokens_per_layer'"):
        Embedder.from_pretrained(adapter, base=base)


def test_no_code_of_a_base_runs(pair: Pair, tmp_path: Path, adapter: Path) -> None:
    base = copy_of(pair, tmp_path)
    config = AutoConfig.from_pretrained(base).to_dict()
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "mine.py").write_text("raise SystemExit('code ran')")
    with pytest.raises(ValueError, match="`base` must be"):
        Embedder.from_pretrained(adapter, base=base)
