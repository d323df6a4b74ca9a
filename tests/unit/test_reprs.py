"""What `print` shows: which adapters a model has, which is active, what it reads and how many thoughts it makes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import source_of
from peft import PeftModel
from tiny_pair import Pair
from torch import Tensor, nn

from softcot_peft import SoftCoTConfig, compute_thoughts
from softcot_peft.serving import Embedder
from softcot_peft.sources import BaseLM, Prompts, ThoughtSource, register_source


def lines_of(model: nn.Module) -> list[str]:
    """The lines of a printed model that name an adapter and its source."""
    return [line.strip() for line in str(model).splitlines() if "Source(" in line]


def test_a_printed_model_names_its_adapters_and_what_they_read(pair: Pair) -> None:
    model = pair.model()
    model.add_adapter(
        "second", pair.config(projection="per_position", num_thought_tokens=3, thought_token="<thought>")
    )
    model.add_adapter("third", pair.config(thought_source="base", assistant_model_name_or_path=None, num_chains=1))
    first, second, third = (
        f"AssistantSource(assistant={str(pair.assistant)!r}, num_thought_tokens=4)",
        f"AssistantSource(assistant={str(pair.assistant)!r}, num_thought_tokens=3, thought_token='<thought>')",
        "BaseSource(num_thought_tokens=4)",
    )
    assert lines_of(model) == [f"default (active): {first}", f"second: {second}", f"third: {third}"]
    model.set_adapter("second")
    assert lines_of(model) == [f"default: {first}", f"second (active): {second}", f"third: {third}"]
    with model.disable_adapter():
        assert lines_of(model) == [f"default: {first}", f"second (disabled): {second}", f"third: {third}"]
    text = str(model)
    assert "(embed_tokens): softcot.SoftCoTLayer(\n" in text
    assert "(default): LinearProjection(in_features=24, out_features=32, bias=True)" in text
    assert "(second): PerPositionProjection(num_maps=3, in_features=24, out_features=32)" in text
    model.delete_adapter("default")
    assert lines_of(model) == [f"second (active): {second}", f"third: {third}"]


def test_a_bare_base_and_copies_are_printed_like_a_peft_model(pair: Pair, model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    base = pair.load_base()
    base.load_adapter(str(tmp_path))
    assert lines_of(base) == lines_of(model) == lines_of(copy.deepcopy(model))
    assert len(lines_of(base)) == 1


def test_trainable_parameters_are_counted(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    pair.model().print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {24 * 32 + 32} || all params: ")


def test_a_source_says_what_it_reads(pair: Pair) -> None:
    source = source_of(pair.model(num_chains=3, inference_num_thought_tokens=2, response_marker="A:"))
    lines = [line.strip() for line in repr(source).splitlines()]
    changed = "inference_num_thought_tokens=2, response_marker='A:', num_chains=3"
    assert lines[:2] == [
        "AssistantSource(",
        f"assistant={str(pair.assistant)!r}, num_thought_tokens=4, {changed}",
    ]
    assert lines[2].startswith("(projection): LinearProjection(")


def test_a_source_of_one_s_own_is_printed_on_one_line(pair: Pair) -> None:
    @register_source("printed")
    class PrintedSource(ThoughtSource):
        def __init__(self, config: SoftCoTConfig, base: BaseLM) -> None:
            super().__init__(config, base)
            self.table = nn.Embedding(8, base.hidden_size)

        def read(self, prompts: Prompts, num_thoughts: int) -> Tensor:
            raise NotImplementedError

        def project(self, states: Tensor) -> Tensor:
            raise NotImplementedError

        def extra_repr(self) -> str:
            return f"{super().extra_repr()},\n  size=8"

    model = pair.model(thought_source="printed", assistant_model_name_or_path=None)
    assert lines_of(model) == ["default (active): PrintedSource(num_thought_tokens=4, size=8)"]


def test_what_computes_thoughts_of_data_sets_says_whose(pair: Pair, model: PeftModel) -> None:
    source = f"AssistantSource(assistant={str(pair.assistant)!r}, num_thought_tokens=4, thought_token='<thought>')"
    assert repr(compute_thoughts(model)) == f"ComputeThoughts({source})"
    assert repr(compute_thoughts(model, 2)) == f"ComputeThoughts({source}, num_thought_tokens=2)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedder_says_what_it_embeds(pair: Pair, tmp_path: Path, dtype: Any) -> None:
    pair.model().save_pretrained(tmp_path)
    embedder = Embedder.from_pretrained(tmp_path, base=pair.base, dtype=dtype)
    source = f"AssistantSource(assistant={str(pair.assistant)!r}, num_thought_tokens=4)"
    assert repr(embedder) == f"Embedder({source}, base={str(pair.base)!r}, dtype={dtype}, device='cpu')"
