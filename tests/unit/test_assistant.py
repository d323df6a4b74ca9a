"""The assistant: found, shared, given, loaded late, and never a part of the base."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import generated, next_logits, training_loss
from helpers import (
    OWN_MODULES,
    PROJECTION,
    Assistant,
    assistant_of,
    backbone_for,
    backbone_of,
    users_of,
    watch_loading,
)
from oracle import Oracle
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification, PreTrainedModel

from softcot_peft import use_assistant

pytestmark = pytest.mark.usefixtures("nothing_given")
NEW = 5
COMMITS = {"main": "a" * 40, "v1": "b" * 40, "v1-again": "b" * 40}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names whose weights the package loads, in order."""
    names: list[str] = []
    original: Callable[..., Any] = AutoModelForCausalLM.from_pretrained

    def load(name: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(str(name))
        return original(name, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    return names


@pytest.fixture
def hub(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`org/assistant` in a Hub cache, with two commits of other weights and three names for them."""
    repository = tmp_path / "models--org--assistant"
    (repository / "refs").mkdir(parents=True)
    for name, commit in COMMITS.items():
        (repository / "refs" / name).write_text(commit, encoding="utf-8")
        folder = repository / "snapshots" / commit
        shutil.copytree(pair.assistant if name == "main" else pair.chat_assistant, folder, dirs_exist_ok=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return "org/assistant"


@pytest.fixture
def fresh(pair: Pair, tmp_path: Path) -> Path:
    """A folder of the assistant that no other test uses, so that nothing of it is loaded yet."""
    return Path(shutil.copytree(pair.assistant, tmp_path / "fresh"))


def load_assistant(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def answers(model: nn.Module, pair: Pair, **kwargs: Any) -> list[list[int]]:
    return generated(model, pair.batch(QUESTIONS), NEW, min_new_tokens=NEW, **kwargs)


def give(model: PreTrainedModel | PeftModel, pair: Pair) -> str:
    return use_assistant(model, AutoTokenizer.from_pretrained(pair.assistant), name="mine")


def logits(model: nn.Module, pair: Pair) -> Tensor:
    """Logits of the token after each question, `(B, V)`."""
    return next_logits(model, pair.batch(QUESTIONS))


def watch(model: PreTrainedModel, look: Callable[[nn.Module], Any]) -> list[Any]:
    """What `look` sees at every pass of an assistant."""
    seen: list[Any] = []
    model.base_model.register_forward_pre_hook(lambda module, args: seen.append(look(module)))
    return seen


def oracle_logits(oracle: Oracle, pair: Pair) -> Tensor:
    """The oracle's logits for the token after each question."""
    with torch.no_grad():
        return torch.stack([oracle.logits(row, [])[-1] for row in pair.rows(QUESTIONS)])


# Sharing


def test_adapters_that_name_the_same_assistant_share_one(pair: Pair) -> None:
    model = pair.model()
    model.add_adapter("other", pair.config(num_thought_tokens=2))
    other_model = pair.model()
    bare = pair.load_base()
    bare.add_adapter(pair.config())
    shared = assistant_of(model)
    assert assistant_of(model, "other") is shared
    assert assistant_of(other_model) is shared
    assert assistant_of(bare) is shared


def test_models_that_share_an_assistant_load_it_once(pair: Pair, fresh: Path, loads: list[str]) -> None:
    models = [pair.model(assistant_model_name_or_path=str(fresh), num_thought_tokens=num) for num in (4, 2)]
    for model in models:
        logits(model, pair)
    assert loads.count(str(fresh)) == 1


def test_other_names_and_dtypes_have_their_own(pair: Pair) -> None:
    found = [
        assistant_of(pair.model(**changes))
        for changes in (
            {},
            {"assistant_dtype": "bfloat16"},
            {"assistant_model_name_or_path": str(pair.twin)},
        )
    ]
    assert len({id(assistant) for assistant in found}) == 3


def test_revisions_share_an_assistant_when_they_are_one_commit(pair: Pair, hub: str) -> None:
    found = {
        revision: assistant_of(pair.model(assistant_model_name_or_path=hub, assistant_revision=revision))
        for revision in (None, "main", "v1", "v1-again", COMMITS["v1"])
    }
    assert found[None] is found["main"]
    assert found["v1"] is found["v1-again"] is found[COMMITS["v1"]]
    assert found["v1"] is not found["main"]


@pytest.mark.parametrize("revision", [None, "v1"])
def test_the_resolved_commit_is_written_on_save(pair: Pair, hub: str, tmp_path: Path, revision: str | None) -> None:
    model = pair.model(assistant_model_name_or_path=hub, assistant_revision=revision)
    model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["assistant_revision"] == COMMITS[revision or "main"]


@pytest.mark.parametrize("revision", [None, "v1", COMMITS["v1"]])
def test_the_assistant_of_a_revision_has_its_weights(pair: Pair, hub: str, revision: str | None) -> None:
    model = pair.model(assistant_model_name_or_path=hub, assistant_revision=revision)
    folder = pair.assistant if revision is None else pair.chat_assistant
    expected = oracle_logits(Oracle.of(model, pair.base, folder, 4), pair)
    torch.testing.assert_close(logits(model, pair), expected, atol=1e-3, rtol=1e-4)


def test_a_given_model_keeps_the_revision_that_the_config_names(pair: Pair, hub: str, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(hub, revision="v1")
    model = pair.model(assistant_model_name_or_path=use_assistant(loaded), assistant_revision="v1")
    model.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["assistant_model_name_or_path"] == hub
    assert written["assistant_revision"] in ("v1", COMMITS["v1"])


def test_an_assistant_that_nobody_uses_any_more_is_freed(pair: Pair) -> None:
    model = pair.model(assistant_dtype="float16")  # a key of this test's own
    logits(model, pair)
    remembered = weakref.ref(assistant_of(model))
    del model
    gc.collect()
    assert remembered() is None


# Given with `use_assistant`


def in_memory(folder: Path) -> PreTrainedModel:
    """A model that came from nowhere."""
    loaded = load_assistant(folder)
    model = type(loaded)(copy.deepcopy(loaded.config))
    model.config._name_or_path = model.name_or_path = ""
    model.load_state_dict(loaded.state_dict())
    return model


def test_a_model_made_in_memory_is_used_under_its_given_name(pair: Pair, loads: list[str]) -> None:
    given = in_memory(pair.assistant)
    assert use_assistant(given, AutoTokenizer.from_pretrained(pair.assistant), name="in memory") == "in memory"
    loads.clear()
    model = pair.model(assistant_model_name_or_path="in memory")
    found = logits(model, pair)
    assert loads == [str(pair.base)]
    oracle = Oracle.of(model, pair.base, pair.assistant, 4)
    torch.testing.assert_close(found, oracle_logits(oracle, pair), atol=1e-3, rtol=1e-4)


def test_a_model_without_a_name_must_be_given_one(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"`name` must be given.*name='my-assistant'"):
        use_assistant(in_memory(pair.assistant))


def test_a_model_is_used_under_its_own_name_when_none_is_given(pair: Pair, loads: list[str]) -> None:
    given = load_assistant(pair.assistant)
    loads.clear()
    assert use_assistant(given) == str(pair.assistant)
    seen = watch(given, lambda module: True)
    model = pair.model()  # names the folder
    logits(model, pair)
    assert seen == [True]
    assert str(pair.assistant) not in loads


def test_a_given_model_is_neither_changed_nor_copied(pair: Pair) -> None:
    given = load_assistant(pair.assistant).to(torch.bfloat16)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    model = pair.model(assistant_model_name_or_path=give(given, pair)).to(torch.float16).float()
    training_loss(model, pair.batch(QUESTIONS))
    assert backbone_of(model) is given.base_model
    assert all(parameter.requires_grad for parameter in given.parameters())
    assert {value.dtype for value in given.state_dict().values()} == {torch.bfloat16}
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())


def test_adapters_keep_the_model_they_were_attached_with(pair: Pair) -> None:
    model = pair.model(assistant_model_name_or_path=give(load_assistant(pair.assistant), pair))
    before = answers(model, pair)
    other = load_assistant(pair.assistant)
    other.base_model.norm.weight.data.normal_()
    give(other, pair)
    assert answers(model, pair) == before
    assert answers(pair.model(assistant_model_name_or_path="mine"), pair) != before


def test_a_lora_tuned_assistant_counts_with_its_lora(pair: Pair, tmp_path: Path) -> None:
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=64, init_lora_weights=False, target_modules=["q_proj", "v_proj"]
    )
    tuned = get_peft_model(load_assistant(pair.assistant), lora)
    model = pair.model(assistant_model_name_or_path=give(tuned, pair))
    found = logits(model, pair)

    tuned.merge_and_unload().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(pair.assistant).save_pretrained(tmp_path)
    expected = oracle_logits(Oracle.of(model, pair.base, tmp_path, 4), pair)
    untuned = oracle_logits(Oracle.of(model, pair.base, pair.assistant, 4), pair)
    assert not torch.allclose(expected, untuned, atol=0.1)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["prompt tuning", "softcot"])
def test_a_tuning_that_a_backbone_does_not_show_is_refused(pair: Pair, method: str) -> None:
    if method == "softcot":
        tuned = pair.model()
    else:
        tuned = get_peft_model(
            load_assistant(pair.assistant), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        )
    with pytest.raises(ValueError, match=r"PROMPT_TUNING|SOFTCOT") as info:
        use_assistant(tuned, name="tuned")
    assert "`model`" in str(info.value)


def test_a_model_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`model` must be a loaded transformers model, got Linear"):
        use_assistant(nn.Linear(2, 2), name="linear")  # type: ignore[arg-type]


def test_a_model_without_a_head_is_refused(pair: Pair) -> None:
    backbone = load_assistant(pair.assistant).base_model
    with pytest.raises(ValueError, match=r"causal LM with its head, got Olmo2Model.*AutoModelForCausalLM"):
        use_assistant(backbone, name="backbone")
    classifier = LlamaForSequenceClassification(pair.load_base().config)
    with pytest.raises(ValueError, match=r"causal LM with its head, got LlamaForSequenceClassification"):
        use_assistant(classifier, name="classifier")


def test_a_given_model_takes_its_tokenizer_from_its_name(pair: Pair) -> None:
    given = load_assistant(pair.assistant)
    use_assistant(given, name=str(pair.assistant))
    assert answers(pair.model(), pair)
    use_assistant(given, name="nowhere")
    with pytest.raises(
        ValueError, match=r"(?s)no tokenizer can be loaded from 'nowhere'.*use_assistant\(model, tokenizer"
    ):
        pair.model(assistant_model_name_or_path="nowhere")


# Apart from the base


def test_nothing_of_the_assistant_is_part_of_the_base(pair: Pair) -> None:
    base = pair.load_base()
    names = set(base.state_dict())
    parameters = {id(parameter) for parameter in base.parameters()}
    kinds = {type(module) for module in base.modules()}
    model = get_peft_model(base, pair.config())
    logits(model, pair)  # the assistant is loaded
    assistant = backbone_of(model)

    own = {name for name in base.state_dict() if "softcot" in name}
    assert {name.replace("base_layer.", "") for name in base.state_dict()} - own == names
    assert own == {f"model.embed_tokens.{PROJECTION}.default.{part}" for part in ("weight", "bias")}
    trained = [parameter for parameter in model.parameters() if id(parameter) not in parameters]
    assert [tuple(parameter.shape) for parameter in trained] == [(32, 24), (32,)]
    assert {type(module).__name__ for module in base.modules() if type(module) not in kinds} == OWN_MODULES
    assert not {id(module) for module in assistant.modules()} & {id(module) for module in model.modules()}


def test_casting_the_base_leaves_the_assistant_alone(pair: Pair) -> None:
    model = pair.model()
    logits(model, pair)
    model.to(torch.bfloat16)
    assert backbone_of(model).dtype == torch.float32


# Devices. "cpu" and "cpu:0" are two devices to PyTorch, so that one machine has both.

HERE, THERE = torch.device("cpu"), torch.device("cpu:0")


class User:
    """Stands for the wrapped embedding of a base."""


def own(folder: Path) -> Assistant:
    return Assistant(str(folder), AutoModelForCausalLM.from_pretrained(folder).config)


def test_two_bases_on_two_devices_have_a_model_each(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assistant, one, other, loaded = own(fresh), User(), User(), watch_loading(monkeypatch)
    first, second = backbone_for(assistant, HERE, one), backbone_for(assistant, THERE, other)
    monkeypatch.setattr(nn.Module, "to", None)  # nothing is moved from here on
    for _ in range(3):
        assert backbone_for(assistant, HERE, one) is first
        assert backbone_for(assistant, THERE, other) is second
    assert first.model is not second.model
    assert loaded == [HERE, THERE]


def test_models_on_devices_that_no_living_base_is_on_are_let_go_of(fresh: Path) -> None:
    assistant, one, other = own(fresh), User(), User()
    first = weakref.ref(backbone_for(assistant, HERE, one).model)
    second = weakref.ref(backbone_for(assistant, THERE, other).model)
    gc.collect()
    assert first() is not None
    assert second() is not None
    backbone_for(assistant, THERE, one)  # the base was moved
    gc.collect()
    assert first() is None
    first = weakref.ref(backbone_for(assistant, HERE, one).model)
    del other
    gc.collect()
    backbone_for(assistant, HERE, one)
    gc.collect()
    assert second() is None
    assert first() is not None


def test_a_model_that_runs_is_not_moved_by_another_thread(fresh: Path) -> None:
    assistant, ids = own(fresh), torch.arange(5, 13)[None]
    mask, started, moved = torch.ones_like(ids), threading.Event(), threading.Event()
    expected = assistant.hidden_states(ids, mask, 2, HERE)
    running, users = assistant.backbone(HERE), [User(), User()]

    def pause(*_: Any) -> None:
        started.set()
        assert moved.wait(timeout=60)

    handle = running.layers[0].register_forward_hook(pause)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(assistant.hidden_states(ids, mask, 2, HERE, users[0])))
    thread.start()
    assert started.wait(timeout=60)
    before = [weight.data_ptr() for weight in running.parameters()]
    assert torch.equal(assistant.hidden_states(ids, mask, 2, THERE, users[1]), expected)
    assert [weight.data_ptr() for weight in running.parameters()] == before
    moved.set()
    thread.join()
    handle.remove()
    assert torch.equal(found[0], expected)


def test_every_base_asks_in_its_own_name(pair: Pair, fresh: Path) -> None:
    models = [pair.model(assistant_model_name_or_path=str(fresh)) for _ in range(2)]
    for model in (*models, copy.deepcopy(models[0])):
        logits(model, pair)
    users = users_of(assistant_of(models[0]))
    assert all(model.get_input_embeddings() in users for model in models)
    del models[1], model
    gc.collect()
    assert list(users) == [models[0].get_input_embeddings()]


def test_a_given_model_is_never_moved(pair: Pair) -> None:
    loaded = load_assistant(pair.assistant)
    assistant = assistant_of(pair.model(assistant_model_name_or_path=give(loaded, pair)))
    assert assistant.backbone(HERE) is assistant.backbone(THERE) is loaded.base_model


# Loading


def test_weights_are_not_loaded_before_they_are_needed(
    pair: Pair, fresh: Path, loads: list[str], tmp_path: Path
) -> None:
    model = pair.model(assistant_model_name_or_path=str(fresh))
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(pair.load_base(), tmp_path / "adapter")
    with reloaded.disable_adapter():
        answers(reloaded, pair)
    assert str(fresh) not in loads
    logits(reloaded, pair)
    assert loads.count(str(fresh)) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_assistant_dtype_is_the_dtype_it_is_loaded_in(pair: Pair, dtype: Any) -> None:
    model = pair.model(assistant_dtype=dtype)
    found = logits(model, pair)
    assert backbone_of(model).dtype == torch.bfloat16
    given = give(AutoModelForCausalLM.from_pretrained(pair.assistant, dtype=torch.bfloat16), pair)
    assert torch.equal(found, logits(pair.model(assistant_model_name_or_path=given), pair))
    assert not torch.equal(found, logits(pair.model(), pair))


def test_auto_is_the_dtype_of_the_checkpoint(pair: Pair, tmp_path: Path) -> None:
    load_assistant(pair.assistant).to(torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(pair.assistant).save_pretrained(tmp_path)
    model = pair.model(assistant_model_name_or_path=str(tmp_path))
    assert backbone_of(model).dtype == torch.bfloat16
    assert model.get_base_model().dtype == torch.float32


@pytest.mark.parametrize("field", ["assistant_model_name_or_path", "tokenizer_name_or_path"])
def test_a_folder_without_a_tokenizer_is_refused(pair: Pair, tmp_path: Path, field: str) -> None:
    # transformers makes an empty tokenizer for some architectures, which would read every prompt as nothing.
    load_assistant(pair.assistant).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`{field}`") as info:
        pair.model(**{field: str(tmp_path)})
    assert str(tmp_path) in str(info.value)
    assert "tokenizer" in str(info.value)


# Strangers' adapters name assistants, so nothing that they name may run code.


def test_weights_that_are_no_safetensors_are_refused(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.assistant, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(load_assistant(pair.assistant).state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    AutoModelForCausalLM.from_pretrained(tmp_path / "pickled")  # which loads without the package
    model = pair.model(assistant_model_name_or_path=str(tmp_path / "pickled"))
    with pytest.raises(ValueError, match=r"must be safetensors; .*use_assistant") as info:
        logits(model, pair)
    assert str(tmp_path / "pickled") in str(info.value)


_EVIL = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import Qwen2Config as Config, Qwen2ForCausalLM as Model, PreTrainedTokenizerFast as OwnTokenizer
"""


def _with_code(pair: Pair, folder: Path, model_type: str) -> Path:
    shutil.copytree(pair.assistant, folder)
    code = _EVIL.format(mark=str(folder / "ran"))
    (folder / "evil.py").write_text(code, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model"}
    changed = config | {"model_type": model_type, "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    changed = config | {"auto_map": {"AutoTokenizer": [None, "evil.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(changed), encoding="utf-8")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code, encoding="utf-8")
    return folder


def test_code_beside_a_known_architecture_does_not_run(pair: Pair, tmp_path: Path) -> None:
    folder = _with_code(pair, tmp_path / "evil", "qwen2")
    model = pair.model(assistant_model_name_or_path=str(folder))
    found = logits(model, pair)
    expected = oracle_logits(Oracle.of(model, pair.base, folder, 4), pair)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert not list(tmp_path.rglob("ran"))


def test_an_architecture_that_needs_code_is_refused(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _with_code(pair, tmp_path / "evil", "unheard-of")
    monkeypatch.setattr("builtins.input", lambda *args: "y")  # transformers would ask at a terminal
    with pytest.raises(ValueError, match="assistant_model_name_or_path") as info:
        pair.model(assistant_model_name_or_path=str(folder))
    assert str(folder) in str(info.value)
    assert "use_assistant" in str(info.value)
    assert not list(tmp_path.rglob("ran"))


def test_code_of_the_base_s_tokenizer_does_not_run(pair: Pair, tmp_path: Path) -> None:
    folder = _with_code(pair, tmp_path / "evil", "qwen2")
    pair.model(tokenizer_name_or_path=str(folder))
    assert not list(tmp_path.rglob("ran"))
