"""Bases with a part that something else has wrapped: compiled layers, FSDP, packed embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import step
from one_question import PROMPT, answer, response_batch, save_and_answer
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_pair import Pair
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from softcot_peft import SoftCoTConfig


@pytest.fixture
def saved(pair: Pair, tmp_path: Path) -> tuple[Path, list[int]]:
    """A saved adapter, and the oracle's tokens."""
    return save_and_answer(pair, tmp_path / "adapter")


# Adapters on bases with a wrapped part


def compile_backbone(base: Any) -> None:
    base.model = torch.compile(base.model, backend="eager")


def compile_layers(base: Any) -> None:
    base.model.layers = nn.ModuleList(torch.compile(layer, backend="eager") for layer in base.model.layers)


def compile_embedding(base: Any) -> None:
    base.set_input_embeddings(torch.compile(base.get_input_embeddings(), backend="eager"))


WRAPPED = [compile_backbone, compile_layers, compile_embedding]
LOADED: dict[str, Callable[[Any, Path], nn.Module]] = {
    "PeftModel": lambda base, folder: PeftModel.from_pretrained(base, folder),
    "low memory": lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    "trainable": lambda base, folder: PeftModel.from_pretrained(base, folder, is_trainable=True),
    "load_adapter": lambda base, folder: (base.load_adapter(str(folder)), base)[1],
}


@pytest.mark.parametrize("load", LOADED.values(), ids=LOADED)
@pytest.mark.parametrize("wrap", WRAPPED)
def test_an_adapter_is_loaded_into_a_compiled_part(
    pair: Pair, saved: tuple[Path, list[int]], wrap: Callable[[Any], None], load: Callable[[Any, Path], nn.Module]
) -> None:
    folder, tokens = saved
    base = pair.load_base()
    wrap(base)
    assert answer(load(base, folder), pair) == tokens
    torch.compiler.reset()


@pytest.mark.parametrize("how", ["PeftModel", "base"])
@pytest.mark.parametrize("wrap", WRAPPED)
def test_an_adapter_saved_from_a_compiled_part_is_as_any_other(
    pair: Pair, saved: tuple[Path, list[int]], tmp_path: Path, wrap: Callable[[Any], None], how: str
) -> None:
    folder, tokens = saved
    base = pair.load_base()
    wrap(base)
    model: Any = (
        PeftModel.from_pretrained(base, folder) if how == "PeftModel" else LOADED["load_adapter"](base, folder)
    )
    model.save_pretrained(tmp_path / "again")
    names = [set(load_file(each / "adapter_model.safetensors")) for each in (folder, tmp_path / "again")]
    assert names[0] == names[1]
    assert answer(PeftModel.from_pretrained(pair.load_base(), tmp_path / "again"), pair) == tokens


def test_a_second_adapter_is_loaded_into_a_compiled_part(pair: Pair, saved: tuple[Path, list[int]]) -> None:
    folder, tokens = saved
    base = pair.load_base()
    compile_backbone(base)
    model = get_peft_model(base, pair.config(num_thought_tokens=2))
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    assert answer(model, pair) == tokens
    torch.compiler.reset()


class Renamed(nn.Module):
    """What a user's own wrapper does to the names of what it holds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("load", LOADED.values(), ids=LOADED)
def test_a_wrapper_that_nobody_knows_is_refused_before_anything_runs(
    pair: Pair, saved: tuple[Path, list[int]], load: Callable[[Any, Path], nn.Module]
) -> None:
    base = pair.load_base()
    base.model.embed_tokens, embedding = Renamed(base.model.embed_tokens), base.model.embed_tokens
    base.get_input_embeddings = lambda: base.model.embed_tokens.inner
    assert base.get_input_embeddings() is embedding
    with pytest.raises(ValueError, match=r"must hold model\.embed_tokens\.inner\.softcot_projection"):
        load(base, saved[0])


def test_what_hides_the_names_of_a_part_is_refused(pair: Pair, saved: tuple[Path, list[int]], tmp_path: Path) -> None:
    base = pair.load_base()
    base.model = checkpoint_wrapper(base.model)  # a state without the wrapper's name, and modules with it
    with pytest.raises(ValueError, match=r"must hold model\._checkpoint_wrapped_module\.embed_tokens\.softcot_proj"):
        PeftModel.from_pretrained(base, saved[0])
    base = pair.load_base()
    base.model = checkpoint_wrapper(base.model)
    with pytest.raises(ValueError, match="something that renames modules is wrapped"):
        get_peft_model(base, pair.config()).save_pretrained(tmp_path / "never")


def test_a_base_that_fsdp_has_wrapped_is_refused(pair: Pair) -> None:
    base = pair.load_base()
    base.model._fsdp_wrapped_module = nn.Module()  # the name that FSDP1 gives what it wraps
    base.model._fsdp_wrapped_module.embed_tokens = base.model.embed_tokens
    del base.model.embed_tokens
    base.get_input_embeddings = lambda: base.model._fsdp_wrapped_module.embed_tokens
    with pytest.raises(ValueError, match="must not be wrapped by FSDP yet"):
        get_peft_model(base, pair.config())


@pytest.mark.parametrize("run", [answer, lambda model, pair: model.eval()(**pair.batch([PROMPT]), logits_to_keep=1)])
def test_a_config_without_its_weights_never_answers(
    pair: Pair, saved: tuple[Path, list[int]], run: Callable[..., Any]
) -> None:
    folder, tokens = saved
    model = get_peft_model(pair.load_base(), SoftCoTConfig.from_pretrained(str(folder)))
    with pytest.raises(ValueError, match=r"'default' must be loaded.*`inference_mode=True`.*from_pretrained"):
        run(model, pair)
    weights = PeftModel.from_pretrained(pair.load_base(), folder).state_dict()
    model.load_state_dict({name: value for name, value in weights.items() if "softcot_" in name}, strict=False)
    assert answer(model, pair) == tokens


# Embeddings whose storage is not their width


class Packed(nn.Embedding):
    """Holds two numbers in one, as packed formats do."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(*weight.shape, device="meta")
        halves = weight.detach().to(torch.bfloat16).view(torch.uint8)
        self.weight = nn.Parameter(halves, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's own name
        return nn.functional.embedding(input, self.weight).view(torch.bfloat16).float()


@pytest.mark.parametrize("autocast", [True, False])
def test_a_packed_embedding_carries_thoughts_of_the_model_s_width(
    pair: Pair, saved: tuple[Path, list[int]], autocast: bool
) -> None:
    answers = []
    for pack in (True, False):
        base = pair.load_base()
        weight = base.get_input_embeddings().weight
        weight.data = weight.data.bfloat16().float()
        if pack:
            base.set_input_embeddings(Packed(weight))
        model = PeftModel.from_pretrained(base, saved[0], autocast_adapter_dtype=autocast)
        answers.append(answer(model, pair))
        assert model.get_input_embeddings().base_hidden_size == 32
        if pack:
            fresh = get_peft_model(model.unload(), pair.config())
            output, gradient = step(fresh.train(), response_batch(pair))
            assert output.loss.isfinite()
            assert gradient.norm() > 0
    assert answers[0] == answers[1]
