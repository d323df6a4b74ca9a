"""Adapters and assistants of strangers: files made to run code, to read elsewhere, to take memory, to change the base.

SECURITY.md says what holds; each of its statements has a test here.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import next_logits
from helpers import limit_parameters, reader_of
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from project_files import rewrite
from safetensors.torch import load_file, save_file
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from softcot_peft import SoftCoTConfig

SAFETENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
ROUTES = pytest.mark.parametrize("route", ["peft", "load_adapter", "auto", "folder"])
HUGE = 10**12


@pytest.fixture(scope="module")
def honest(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter."""
    folder = tmp_path_factory.mktemp("honest")
    pair.model().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(honest: Path, tmp_path: Path) -> Path:
    """A copy of it, to be made hostile."""
    return Path(shutil.copytree(honest, tmp_path / "adapter"))


@pytest.fixture
def assistant(pair: Pair, tmp_path: Path) -> Path:
    """A copy of the assistant, to be made hostile."""
    return Path(shutil.copytree(pair.assistant, tmp_path / "assistant"))


class Trap:
    """Code that leaves a file behind when it runs."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)

    @property
    def module(self) -> str:
        return f"import os\nos.mkdir({str(self.file)!r})\nclass Code: pass\n"


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    """A trap that must not have been sprung when the test ends."""
    found = Trap(tmp_path / "sprung")
    yield found
    assert not found.file.exists()


def test_the_trap_springs_where_pickles_are_read(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    torch.save({"x": trap}, tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert trap.file.exists()


def load(route: str, pair: Pair, folder: Path) -> Any:
    if route == "peft":
        return PeftModel.from_pretrained(pair.load_base(), folder)
    if route == "load_adapter":
        base = pair.load_base()
        base.load_adapter(str(folder))
        return base
    kind = AutoPeftModelForCausalLM if route == "auto" else AutoModelForCausalLM
    return kind.from_pretrained(folder)


def answers(model: nn.Module, pair: Pair) -> Tensor:
    return next_logits(model.eval(), pair.batch(QUESTIONS))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / SAFETENSORS)


def replace_weights(folder: Path, **tensors: Tensor) -> None:
    """Replace the tensors whose names end so, and add others as they are named."""
    found = weights(folder)
    for end, tensor in tensors.items():
        name = next((name for name in found if name.endswith(f".{end}")), end)
        found[name] = tensor
    save_file(found, folder / SAFETENSORS)


def plain(base: PreTrainedModel) -> bool:
    return type(base.get_input_embeddings()) is nn.Embedding and "generate" not in vars(base)


# Weights of the adapter


@ROUTES
def test_an_honest_adapter_loads(pair: Pair, honest: Path, adapter: Path, route: str) -> None:
    expected = answers(PeftModel.from_pretrained(pair.load_base(), honest), pair)
    assert torch.equal(answers(load(route, pair, adapter), pair), expected)


BASE_KEYS = [
    "base_model.model.lm_head.weight",
    "lm_head.weight",
    "base_model.model.model.embed_tokens.weight",
    "base_model.model.model.embed_tokens.base_layer.weight",
    "model.embed_tokens.base_layer.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.weight",
    "base_model.model.model.norm.weight",
    "unheard.of",
]


@pytest.mark.parametrize("key", BASE_KEYS)
@pytest.mark.parametrize("route", ["peft", "load_adapter"])
def test_a_file_that_would_change_the_base_is_refused(pair: Pair, adapter: Path, key: str, route: str) -> None:
    base = pair.load_base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    bare = key.removeprefix("base_model.model.").replace("base_layer.", "")
    replace_weights(adapter, **{key: before[bare] + 1 if bare in before else torch.zeros(3)})
    with pytest.raises(ValueError, match=r"must hold its projection and nothing else, but '.*save_embedding_layers"):
        base.load_adapter(str(adapter)) if route == "load_adapter" else PeftModel.from_pretrained(base, adapter)
    assert plain(base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    torch.testing.assert_close(answers(base, pair), answers(pair.load_base(), pair))


@pytest.mark.parametrize("route", ["auto", "folder"])
def test_no_route_loads_weights_of_the_base(pair: Pair, adapter: Path, route: str) -> None:
    replace_weights(adapter, **{BASE_KEYS[0]: torch.zeros(len(pair.tokenizer), 32)})
    with pytest.raises(ValueError, match="its projection and nothing else"):
        load(route, pair, adapter)


@pytest.mark.parametrize("route", ["peft", "load_adapter"])
def test_copies_of_the_bases_own_weights_are_let_be(pair: Pair, honest: Path, adapter: Path, route: str) -> None:
    base = pair.load_base()
    replace_weights(
        adapter, **{BASE_KEYS[0]: base.lm_head.weight.detach().clone()}
    )  # as PEFT saves resized embeddings
    torch.testing.assert_close(answers(load(route, pair, adapter), pair), answers(load(route, pair, honest), pair))


@pytest.mark.parametrize("route", ["peft", "load_adapter"])
def test_an_adapter_that_is_refused_leaves_another_one_as_it_was(
    pair: Pair, honest: Path, adapter: Path, route: str
) -> None:
    model = load(route, pair, honest)
    expected = answers(model, pair)
    replace_weights(adapter, **{BASE_KEYS[0]: torch.zeros(len(pair.tokenizer), 32)})
    with pytest.raises(ValueError, match="nothing else"):
        model.load_adapter(str(adapter), adapter_name="second")
    assert torch.equal(answers(model, pair), expected)
    assert list(model.peft_config) == ["default"]


NUMBERS = [
    ({"weight": torch.full((32, 24), float("nan"))}, "weight must hold finite .* some not finite"),
    ({"bias": torch.full((32,), float("inf"))}, "bias must hold finite .* some not finite"),
    ({"weight": torch.ones(32, 24, dtype=torch.int64)}, "weight must hold finite .* torch.int64"),
    ({"weight": torch.ones(32, 24, dtype=torch.bool)}, "weight must hold finite .* torch.bool"),
    ({"bias": torch.ones(32, dtype=torch.complex64)}, "bias must hold finite .* torch.complex64"),
    ({"weight": torch.ones(32)}, r"weight must hold finite .* \(32,\)"),
    ({"weight": torch.ones(())}, r"weight must hold finite .* \(\)"),
    ({"weight": torch.ones(32, 24, 1)}, r"weight must hold finite .* \(32, 24, 1\)"),
    ({"weight": torch.ones(0, 0)}, "assistant hidden size 0 to base hidden size 0"),
    ({"bias": torch.ones(7)}, r"bias must hold finite .* \(7,\)"),
]


@pytest.mark.parametrize(("tensors", "message"), NUMBERS)
@pytest.mark.parametrize("route", ["peft", "load_adapter"])
def test_numbers_that_no_projection_has_are_refused(
    pair: Pair, adapter: Path, tensors: dict[str, Tensor], message: str, route: str
) -> None:
    replace_weights(adapter, **tensors)
    with pytest.raises(ValueError, match=message):
        load(route, pair, adapter)


@pytest.mark.parametrize("left", [[], ["weight"], ["bias"]])
@pytest.mark.parametrize("route", ["peft", "load_adapter"])
def test_half_an_adapter_is_refused(pair: Pair, adapter: Path, left: list[str], route: str) -> None:
    found = {name: tensor for name, tensor in weights(adapter).items() if name.split(".")[-1] in left}
    save_file(found, adapter / SAFETENSORS)
    with pytest.raises(ValueError, match=r"must hold model\.embed_tokens.softcot_projection"):
        load(route, pair, adapter)


@pytest.mark.parametrize("claim", ["header", "tensor", "cut"])
@pytest.mark.parametrize("route", ["peft", "load_adapter"])
def test_a_file_that_claims_to_be_huge_is_refused(pair: Pair, adapter: Path, claim: str, route: str) -> None:
    file = adapter / SAFETENSORS
    entry = {"dtype": "F32", "shape": [HUGE, 24], "data_offsets": [0, HUGE * 96]}
    header = json.dumps({next(iter(weights(adapter))): entry}).encode()
    content = {
        "header": struct.pack("<Q", 2**60) + b"{}",
        "tensor": struct.pack("<Q", len(header)) + header,
        "cut": file.read_bytes()[:-8],
    }
    file.write_bytes(content[claim])
    with pytest.raises(Exception, match=r"header|Header|Metadata|metadata|not fully covered"):  # of safetensors
        load(route, pair, adapter)


@ROUTES
@pytest.mark.parametrize("kind", ["raw", "torch", "harmless"])
def test_a_pickled_adapter_is_never_read(pair: Pair, adapter: Path, trap: Trap, kind: str, route: str) -> None:
    found = weights(adapter)
    (adapter / SAFETENSORS).unlink()
    if kind == "raw":
        (adapter / PICKLE).write_bytes(pickle.dumps(trap))
    else:
        torch.save(found if kind == "harmless" else found | {"x": trap}, adapter / PICKLE)
    with pytest.raises((ValueError, OSError), match=r"got a pickle|adapter_model\.safetensors"):
        load(route, pair, adapter)


def test_a_pickle_beside_the_safetensors_file_is_not_looked_at(pair: Pair, adapter: Path, trap: Trap) -> None:
    (adapter / PICKLE).write_bytes(pickle.dumps(trap))
    load("peft", pair, adapter)


@pytest.mark.parametrize("cached", [True, False])
def test_a_pickled_adapter_of_the_hub_is_never_read(pair: Pair, adapter: Path, tmp_path: Path, cached: bool) -> None:
    torch.save(weights(adapter), adapter / PICKLE)
    commit = "0" * 40
    snapshot = tmp_path / "hub" / "models--stranger--adapter" / "snapshots" / commit
    shutil.copytree(adapter, snapshot, ignore=None if cached else shutil.ignore_patterns(SAFETENSORS))
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    base = pair.load_base()
    if cached:
        PeftModel.from_pretrained(base, "stranger/adapter", cache_dir=tmp_path / "hub")
        return
    with pytest.raises(ValueError, match="got a pickle in 'stranger/adapter'"):
        PeftModel.from_pretrained(base, "stranger/adapter", cache_dir=tmp_path / "hub")
    assert plain(base)


# The adapter's config


@pytest.mark.parametrize(
    "changes",
    [
        {"trust_remote_code": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
        {"auto_map": {"AutoModel": "evil.Code"}},
        {"bias": "all"},
        {"layer_replication": [[0, 1]]},
    ],
)
def test_unknown_fields_are_dropped_with_pefts_warning(
    pair: Pair, honest: Path, adapter: Path, changes: dict[str, Any]
) -> None:
    (name,) = changes
    rewrite(adapter, **changes)
    with pytest.warns(UserWarning, match=rf"Unexpected keyword arguments \['{name}'\] for class SoftCoTConfig"):
        model = load("peft", pair, adapter)
    assert torch.equal(answers(model, pair), answers(load("peft", pair, honest), pair))
    assert not hasattr(model.peft_config["default"], name) or name == "target_modules"
    assert [name for name, p in model.named_parameters() if p.requires_grad] == []


@pytest.mark.parametrize("name", ["num_thought_tokens", "inference_num_thought_tokens"])
def test_a_number_of_thoughts_that_would_take_all_memory_is_refused(pair: Pair, adapter: Path, name: str) -> None:
    rewrite(adapter, **{name: HUGE})
    with pytest.raises(ValueError, match=rf"`{name}` must be at most 65536, got {HUGE}"):
        load("peft", pair, adapter)


@pytest.mark.parametrize("name", ["assistant_hidden_size", "base_hidden_size"])
@pytest.mark.parametrize("value", [HUGE, -1, "32", [32]])
def test_sizes_that_the_pair_does_not_have_are_refused(pair: Pair, adapter: Path, name: str, value: object) -> None:
    rewrite(adapter, **{name: value})
    with pytest.raises(ValueError, match="The adapter's projection goes from"):
        load("peft", pair, adapter)


@pytest.mark.parametrize(
    "dtype", ["load", "__class__", "int8", "complex64", "float8_e4m3fn", "os.system", "", None, ["float32"], "nn"]
)
def test_a_dtype_is_a_dtype(pair: Pair, adapter: Path, dtype: object) -> None:
    rewrite(adapter, assistant_dtype=dtype)
    with pytest.raises(ValueError, match="`assistant_dtype` must be one of"):
        load("peft", pair, adapter)


def test_a_method_that_does_not_exist_is_refused(pair: Pair, adapter: Path) -> None:
    rewrite(adapter, peft_type="EVIL")
    with pytest.raises(KeyError, match="EVIL"):  # PEFT's own
        load("peft", pair, adapter)


def test_a_config_too_deep_to_read_is_refused(pair: Pair, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises((RecursionError, ValueError)):  # PEFT reads it
        load("peft", pair, adapter)


@pytest.mark.parametrize(
    "template",
    ["{prompt.__class__.__init__.__globals__} {prompt}", "{0} {prompt!r:>99999999} {prompt}", "%s {prompt}"],
)
def test_a_template_is_text(pair: Pair, template: str) -> None:
    model = pair.model(assistant_prompt=template)
    reader = reader_of(model)
    row = torch.tensor(pair.rows(["seven dogs"]))
    ids, mask = reader.read(row, torch.ones_like(row), 4)
    wanted = reader.assistant.tokenizer(template.replace("{prompt}", "seven dogs"))["input_ids"]
    assert ids[0, :-4].tolist() == wanted
    assert mask.all()


def test_a_library_named_by_the_config_is_not_imported(pair: Pair, adapter: Path, trap: Trap, tmp_path: Path) -> None:
    (tmp_path / "evil_library.py").write_text(trap.module)
    rewrite(adapter, task_type=None, auto_mapping={"parent_library": "evil_library", "base_model_class": "Code"})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with pytest.raises(ValueError, match="import allowlist"):  # PEFT's own
            AutoPeftModelForCausalLM.from_pretrained(adapter)
        load("peft", pair, adapter)


# Where names lead


NAMES = [
    "../../x", "/etc/passwd", "/dev/zero", "~", "~/.ssh", "file:///etc", "http://127.0.0.1:1/x", "https://hub.test/a/b",
    "a\0b", "x" * 100_000, "a" * 255 + "/b", "a/b/c/d", "..", ".", " ", "org/..", "models--a--b/snapshots", "a/b@main",
    "-x", "%2e%2e/x", "//x/y", "\\\\server\\share", "C:\\x", "con", "$HOME", "`id`", "a;b", "\n",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:20]))
@pytest.mark.parametrize("field", ["assistant_model_name_or_path", "tokenizer_name_or_path"])
def test_names_that_are_neither_a_folder_nor_a_hub_id_are_refused(
    pair: Pair, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    rewrite(adapter, **{field: name})
    base = pair.load_base()
    with pytest.raises(ValueError, match=f"`{field}`"):
        PeftModel.from_pretrained(base, adapter)
    assert plain(base)


@pytest.mark.parametrize("revision", ["../..", "refs/pr/1", "\0", "x" * 10_000, "../../../../etc/passwd", ""])
def test_a_revision_does_not_lead_out_of_the_cache(
    pair: Pair, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    # A folder that "<cache>/models--org--name/snapshots/<revision>" would lead to holds a whole model.
    snapshots = tmp_path / "hub" / "models--org--name" / "snapshots"
    snapshots.mkdir(parents=True)
    shutil.copytree(pair.assistant, tmp_path / "hub", dirs_exist_ok=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    rewrite(adapter, assistant_model_name_or_path="org/name", assistant_revision=revision)
    with pytest.raises(ValueError, match="`assistant_model_name_or_path`"):
        load("peft", pair, adapter)


def test_local_folders_are_read_by_relative_and_absolute_names(
    pair: Pair, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(load("peft", pair, adapter), pair)
    monkeypatch.chdir(pair.base)
    for name in ("../assistant", str(pair.assistant), "./../assistant/"):
        rewrite(adapter, assistant_model_name_or_path=name)
        assert torch.equal(answers(load("peft", pair, adapter), pair), expected)


# The assistant


def think_with(pair: Pair, folder: Path, **changes: object) -> Tensor:
    return answers(pair.model(assistant_model_name_or_path=str(folder), **changes), pair)


CODE = {"AutoConfig": "evil.Code", "AutoModelForCausalLM": "evil.Code", "AutoTokenizer": ["evil.Code", "evil.Code"]}


def test_of_a_folder_only_a_models_own_files_are_opened(pair: Pair, adapter: Path, assistant: Path) -> None:
    for name in ("id_rsa", "notes.txt", "pytorch_model.bin", "modeling.py", "data.csv"):
        (assistant / name).write_text("private", encoding="utf-8")
    rewrite(adapter, assistant_model_name_or_path=str(assistant))
    opened: list[Path] = []
    watching = [True]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            opened.append(Path(arguments[0]))

    sys.addaudithook(watch)  # cannot be removed
    try:
        answers(load("peft", pair, adapter), pair)
    finally:
        watching.clear()
    found = {path.name for path in opened if path.parent == assistant}
    assert "config.json" in found
    assert all(name.endswith((".json", ".safetensors", ".jinja")) for name in found)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("trusting", [True, False])
def test_code_of_an_assistant_never_runs(
    pair: Pair, assistant: Path, trap: Trap, file: str, known: bool, trusting: bool
) -> None:
    (assistant / "evil.py").write_text(trap.module)
    changes: dict[str, Any] = {"auto_map": CODE} | ({"trust_remote_code": True} if trusting else {})
    if not known:
        changes |= {"model_type": "evil", "tokenizer_class": "Code"}
    rewrite(assistant, file, **changes)
    if known or file == "tokenizer_config.json":  # transformers' own classes, in place of the code
        assert torch.equal(think_with(pair, assistant), think_with(pair, pair.assistant))
    else:
        with pytest.raises(ValueError, match=r"(?s)`assistant_model_name_or_path`.*trust_remote_code"):
            think_with(pair, assistant)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["stranger/kernel", "stranger/kernel:evil", {"": "stranger/kernel"}])
def test_compiled_code_named_by_an_assistants_config_is_not_fetched(
    pair: Pair, assistant: Path, key: str, value: object
) -> None:
    rewrite(assistant, "config.json", **{key: value})
    with pytest.raises(ValueError, match=r"asks for the code of 'stranger/kernel.* never runs"):
        think_with(pair, assistant)


def test_an_assistants_code_does_not_run_as_the_bases_tokenizer(pair: Pair, tmp_path: Path, trap: Trap) -> None:
    folder = Path(shutil.copytree(pair.base, tmp_path / "base"))
    (folder / "evil.py").write_text(trap.module)
    rewrite(folder, "tokenizer_config.json", auto_map=CODE, tokenizer_class="Code")
    with pytest.raises(ValueError, match=r"(?s)`tokenizer_name_or_path`.*trust_remote_code"):
        pair.model(tokenizer_name_or_path=str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "model.safetensors"])
def test_a_pickled_assistant_is_never_read(pair: Pair, assistant: Path, trap: Trap, name: str) -> None:
    (assistant / "model.safetensors").unlink()
    torch.save({"x": trap}, assistant / name)
    with pytest.raises(ValueError, match=r"the weights of .* cannot be loaded.*must be safetensors"):
        think_with(pair, assistant)


def test_a_pickled_tokenizer_is_never_read(pair: Pair, assistant: Path, trap: Trap) -> None:
    (assistant / "tokenizer.json").unlink()
    for name in ("tokenizer.pkl", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt"):
        (assistant / name).write_bytes(pickle.dumps(trap))
    with pytest.raises(ValueError, match="no tokenizer can be loaded"):
        think_with(pair, assistant)


@pytest.mark.parametrize(
    "path",
    [
        "../outside.safetensors", "/outside.safetensors", "x/../../outside.safetensors",
        "..\\outside.safetensors", "C:outside.safetensors", "\\\\host\\share\\outside.safetensors",  # Windows
    ],
)  # fmt: skip
def test_a_list_of_weight_files_does_not_lead_out_of_the_folder(
    pair: Pair, assistant: Path, tmp_path: Path, path: str
) -> None:
    names = list(load_file(assistant / "model.safetensors"))
    (assistant / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, path.replace("/outside", f"{tmp_path}/outside")
                                                         if path.startswith("/") else path)}  # fmt: skip
    (assistant / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="leads out of its folder"):
        think_with(pair, assistant)


def test_a_list_of_weight_files_within_the_folder_is_read(pair: Pair, assistant: Path) -> None:
    names = list(load_file(assistant / "model.safetensors"))
    (assistant / "model.safetensors").rename(assistant / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (assistant / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(think_with(pair, assistant), think_with(pair, pair.assistant))


SIZES = [
    ({"num_hidden_layers": 10**6}, "`num_hidden_layers` is 1000000"),
    ({"num_hidden_layers": HUGE}, "`num_hidden_layers` is"),
    ({"num_hidden_layers": 1e300}, "`num_hidden_layers` is 1e"),
    ({"text_config": {"n_layer": HUGE}}, "`n_layer` is"),
    ({"num_attention_heads": HUGE}, "`num_attention_heads` is"),
    ({"num_local_experts": HUGE}, "`num_local_experts` is"),
    ({"hidden_size": 10**9}, "at most 65536 wide, got 1000000000"),
    ({"hidden_size": HUGE}, "be loaded"),
    ({"vocab_size": 10**9}, "the weights of .* cannot be loaded"),
    ({"intermediate_size": 10**9}, "the weights of .* cannot be loaded"),
    ({"num_attention_heads": 0}, "be loaded"),
    ({"num_hidden_layers": "x"}, "be loaded"),
    ({"hidden_size": None}, "be loaded"),
    ({"hidden_act": "os.system"}, "be loaded"),
    ({"dtype": "load"}, "be loaded"),
    ({"model_type": "../../x"}, "be loaded"),
    ({"rope_parameters": "x"}, "be loaded"),
]


@pytest.mark.parametrize(("changes", "message"), SIZES, ids=lambda value: str(value)[:40])
def test_an_absurd_config_is_refused_before_memory_is_taken(
    pair: Pair, assistant: Path, changes: dict[str, Any], message: str
) -> None:
    rewrite(assistant, "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        think_with(pair, assistant)


def test_a_config_that_asks_for_endless_modules_under_another_name_is_stopped(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_parameters(monkeypatch, 5)
    with pytest.raises(ValueError, match="asks for more than 5 tensors"):
        pair.model(assistant_dtype="float64")  # another assistant than those in use
    monkeypatch.undo()
    nn.Linear(2, 2)  # nothing is counted any more
    pair.model(assistant_dtype="float64")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ['{"a":' * 100_000 + "1" + "}" * 100_000, "hello", "[1]", "{}", "null", "\0"])
def test_files_that_cannot_be_read_are_refused(pair: Pair, assistant: Path, file: str, content: str) -> None:
    (assistant / file).write_text(content)
    with pytest.raises(ValueError, match=r"`assistant_(model_name_or_path|thought_token)`"):
        think_with(pair, assistant)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('x') }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{% for a in range(10**9) %}x{% endfor %}",
        "{{ broken",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_chat_template_runs_in_the_sandbox(pair: Pair, assistant: Path, template: str) -> None:
    (assistant / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=r"The chat template of the assistant .* cannot be rendered"):
        think_with(pair, assistant, assistant_prompt="{prompt}")


# What the model may be told


@pytest.mark.parametrize("text", ["[EOS]", "[PAD] [BOS]", "[UNK] seven dogs [EOS]"])
def test_a_prompt_cannot_spell_the_assistants_special_tokens(pair: Pair, text: str) -> None:
    model = pair.model()
    reader = reader_of(model)
    row = torch.tensor(pair.rows([text]))
    ids, _ = reader.read(row, torch.ones_like(row), 4)
    special = reader.assistant.tokenizer
    assert not {special.eos_token_id, special.pad_token_id} & set(ids[0, :-4].tolist())
    assert ids[0, :-4].tolist().count(special.bos_token_id) == 1


def test_a_saved_config_holds_no_more_than_was_asked(pair: Pair, honest: Path) -> None:
    saved = json.loads((honest / "adapter_config.json").read_text(encoding="utf-8"))
    assert isinstance(PeftConfig.from_pretrained(honest), SoftCoTConfig)
    assert {"auto_map", "trust_remote_code", "modules_to_save"}.isdisjoint(saved)
    assert get_peft_model(pair.load_base(), SoftCoTConfig.from_pretrained(honest)) is not None
