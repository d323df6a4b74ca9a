"""Bases that accelerate keeps in CPU memory or on disk think, answer and train as if they were all in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers import PROJECTION, projection_of
from peft import PeftModel, get_peft_model
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from softcot_peft import SoftCoTConfig, use_assistant

MODULES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
EMBEDDING = {name: "disk" if name == "model.embed_tokens" else "cpu" for name in MODULES}
LAYER = {name: "disk" if name == "model.layers.0" else "cpu" for name in MODULES}
ALL = dict.fromkeys(MODULES, "disk")
Batch = dict[str, Tensor]

# transformers' own (5.19): an offloaded base counts as on "meta", and its inputs are not
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")


class Bench:
    """An adapter, what it answers in memory, and ways of offloading its base."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.pair, self.folder = pair, folder
        self.batch = pair.batch(QUESTIONS[:3], "right")
        labels = self.batch["input_ids"].clone()
        labels[:, :-2] = -100
        self.labelled = {**self.batch, "labels": labels}
        self.model = pair.model()
        self.model.save_pretrained(folder / "adapter")

    def base(self, device_map: dict[str, str] | None = None) -> PreTrainedModel:
        if device_map is None:
            return self.pair.load_base()
        path = str(self.folder / "disk")
        return AutoModelForCausalLM.from_pretrained(self.pair.base, device_map=device_map, offload_folder=path).eval()

    def attach(self, base: PreTrainedModel, **changes: object) -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(base, self.pair.config(**changes)).eval()

    def load(self, base: PreTrainedModel, device_map: dict[str, str] | None = None) -> PeftModel:
        """Load the adapter; `device_map` of the base's modules."""
        options = {}
        if device_map is not None:
            options["device_map"] = {f"base_model.model.{name}": place for name, place in device_map.items()}
            options["offload_dir"] = str(self.folder / "dispatched")
        return PeftModel.from_pretrained(base, self.folder / "adapter", is_trainable=True, **options).eval()

    def load_by_transformers(self, base: PreTrainedModel) -> PreTrainedModel:
        base.load_adapter(str(self.folder / "adapter"), is_trainable=True)
        return base.eval()

    def dispatch(self, model: nn.Module, device_map: dict[str, str]) -> nn.Module:
        prefix = "base_model.model." if isinstance(model, PeftModel) else ""
        places = {prefix + name: place for name, place in device_map.items()}
        return dispatch_model(model, places, main_device="cpu", offload_dir=str(self.folder / "dispatched"))

    def on_disk(self, model: nn.Module) -> nn.Module:
        return disk_offload(model, str(self.folder / "disk"), execution_device=torch.device("cpu"))

    def in_ram(self, model: nn.Module) -> nn.Module:
        return cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.fixture
def bench(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(
        tmp_path
    )  # where peft 0.21 writes copies of safetensors files, by their whole path made relative
    return Bench(pair, tmp_path)


def check_answers(model: nn.Module, bench: Bench) -> None:
    """Logits and greedy tokens are those of the model in memory."""
    with torch.no_grad():
        expected, found = (each(**bench.batch, logits_to_keep=1).logits for each in (bench.model, model))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=0)
    expected, found = (
        each.generate(**bench.batch, max_new_tokens=8, do_sample=False) for each in (bench.model, model)
    )
    assert found.tolist() == expected.tolist()


def check_trains(model: nn.Module, bench: Bench) -> None:
    """A training step has the loss and gradients of the model in memory, and moves the projection as there."""
    for each in (bench.model, model):
        optimizer = torch.optim.SGD([weight for weight in each.parameters() if weight.requires_grad], lr=0.1)
        each.train()
        loss = each(**bench.labelled).loss
        loss.backward()
        optimizer.step()
        each.eval()
        if each is bench.model:
            expected, before = loss, projection_of(each)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, weight in projection_of(model).named_parameters():
        torch.testing.assert_close(weight.cpu(), before.get_parameter(name), atol=1e-5, rtol=0)


# Ways in which the projection stays in memory.
TRAINABLE: dict[str, Callable[[Bench], nn.Module]] = {
    "cpu_offload, then attached": lambda bench: bench.attach(bench.in_ram(bench.base())),
    "disk_offload, then attached": lambda bench: bench.attach(bench.on_disk(bench.base())),
    "dispatched, then attached": lambda bench: bench.attach(bench.dispatch(bench.base(), EMBEDDING)),
    "dispatched whole, then attached": lambda bench: bench.attach(bench.dispatch(bench.base(), ALL)),
    "embedding loaded on disk, then attached": lambda bench: bench.attach(bench.base(EMBEDDING)),
    "layer loaded on disk, then attached": lambda bench: bench.attach(bench.base(LAYER)),
    "all loaded on disk, then attached": lambda bench: bench.attach(bench.base(ALL)),
    "cpu_offload, then loaded": lambda bench: bench.load(bench.in_ram(bench.base())),
    "layer loaded on disk, then loaded with a map": lambda bench: bench.load(bench.base(LAYER), LAYER),
    "embedding on disk, then load_adapter": lambda bench: bench.load_by_transformers(bench.base(EMBEDDING)),
    "all on disk, then load_adapter": lambda bench: bench.load_by_transformers(bench.base(ALL)),
}
# Ways in which it is offloaded with its embedding.
OFFLOADED: dict[str, Callable[[Bench], nn.Module]] = {
    "attached, then cpu_offload": lambda bench: bench.in_ram(bench.attach(bench.base())),
    "attached, then disk_offload": lambda bench: bench.on_disk(bench.attach(bench.base())),
    "attached, then dispatched": lambda bench: bench.dispatch(bench.attach(bench.base()), EMBEDDING),
    "attached, then dispatched whole": lambda bench: bench.dispatch(bench.attach(bench.base()), ALL),
    "loaded, then disk_offload": lambda bench: bench.on_disk(bench.load(bench.base())),
    "loaded with a map": lambda bench: bench.load(bench.base(EMBEDDING), EMBEDDING),
}


@pytest.mark.parametrize("way", TRAINABLE)
def test_an_adapter_on_an_offloaded_base_answers_and_trains(bench: Bench, way: str) -> None:
    model = TRAINABLE[way](bench)
    assert any(weight.is_meta for weight in model.parameters())
    assert not projection_of(model).weight.is_meta
    check_answers(model, bench)
    check_trains(model, bench)


@pytest.mark.parametrize("way", OFFLOADED)
def test_an_offloaded_adapter_answers_and_refuses_to_train(bench: Bench, way: str) -> None:
    model = OFFLOADED[way](bench)
    assert projection_of(model).weight.is_meta
    check_answers(model, bench)
    model.train()
    with pytest.raises(RuntimeError, match="projection must be in memory to be trained"):
        model(**bench.labelled)
    model.eval()
    check_answers(model, bench)


@pytest.mark.parametrize("way", OFFLOADED)
def test_an_offloaded_projection_runs_also_without_the_embedding(bench: Bench, way: str) -> None:
    embeddings = bench.base().get_input_embeddings()(bench.batch["input_ids"])
    own = torch.zeros(len(embeddings), 6, dtype=torch.long)
    inputs = {"inputs_embeds": embeddings, "assistant_input_ids": own, "logits_to_keep": 1}
    with torch.no_grad():
        found, expected = (model(**inputs).logits for model in (OFFLOADED[way](bench), bench.model))
    torch.testing.assert_close(found, expected)


def test_load_adapter_after_cpu_offload_is_refused_when_it_runs(bench: Bench) -> None:
    model = bench.load_by_transformers(bench.in_ram(bench.base()))
    with pytest.raises(RuntimeError, match="load adapters with `PeftModel"):
        model(**bench.batch, logits_to_keep=1)


def test_a_device_map_is_as_before_when_the_adapter_is_gone(bench: Bench) -> None:
    base = bench.base(EMBEDDING)
    before = dict(base.hf_device_map)
    model = bench.attach(base)
    assert base.hf_device_map[f"model.embed_tokens.{PROJECTION}"] == "cpu"
    assert model.unload().hf_device_map == before


@pytest.mark.parametrize("kept", ["disk", "ram"])
def test_an_offloaded_assistant_given_by_the_user_thinks_the_same(bench: Bench, kept: str) -> None:
    assistant = AutoModelForCausalLM.from_pretrained(bench.pair.assistant)
    offloaded = bench.on_disk(assistant) if kept == "disk" else bench.in_ram(assistant)
    tokenizer = AutoTokenizer.from_pretrained(bench.pair.assistant)
    name = use_assistant(offloaded, tokenizer, name=f"offloaded-{kept}")
    model = bench.attach(bench.base(), assistant_model_name_or_path=name)
    check_answers(model, bench)
    check_trains(model, bench)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="executes on a CUDA device what is kept on CPU and disk")
@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("route", ["attach", "load_adapter", "from_pretrained"])
def test_a_gpu_executes_what_is_offloaded(bench: Bench, place: str, route: str) -> None:
    places: dict[str, str | int] = {name: place if name == "model.embed_tokens" else 0 for name in MODULES}
    base = bench.base(places)
    if route == "attach":
        model = bench.attach(base)
    elif route == "load_adapter":
        model = bench.load_by_transformers(base)
    else:
        model = bench.load(base, places)
    check_answers(model, bench)
    if not projection_of(model).weight.is_meta:
        check_trains(model, bench)


def test_the_config_of_an_adapter_on_an_offloaded_base_is_whole(bench: Bench, tmp_path: Path) -> None:
    model = bench.attach(bench.base(ALL))
    model.save_pretrained(tmp_path / "saved")
    config = SoftCoTConfig.from_pretrained(tmp_path / "saved")
    assert (config.assistant_hidden_size, config.base_hidden_size) == (24, 32)
    again = PeftModel.from_pretrained(bench.base(), tmp_path / "saved").eval()
    check_answers(again, bench)
