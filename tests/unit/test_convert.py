"""Published weights become adapters and the other way round, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from batches import generated, up_to_eos
from helpers import next_states, projection_of, soft_thoughts
from oracle import Oracle
from peft import PeftModel
from tiny_pair import QUESTIONS, Pair
from torch import Tensor
from transformers import AutoModelForCausalLM

from softcot_peft.convert import convert, convert_back, main

N = 4


def published(path: Path, maps: int = 0, shape: tuple[int, int] = (32, 24)) -> dict[str, Tensor]:
    """A file as the published code writes it, in bfloat16."""
    torch.manual_seed(5)
    one = {"weight": lambda: torch.randn(shape).bfloat16(), "bias": lambda: torch.randn(shape[0]).bfloat16()}
    names = [f"{index}." for index in range(maps)] or [""]
    tensors = {before + name: make() for before in names for name, make in one.items()}
    torch.save(tensors, path)
    return tensors


def test_a_projection_becomes_an_adapter_and_comes_back(pair: Pair, tmp_path: Path) -> None:
    tensors, file = published(tmp_path / "projection.bin"), tmp_path / "projection.bin"
    arguments = ["--base", str(pair.base), "--assistant", str(pair.assistant), "--num-thought-tokens", str(N)]
    main([str(file), *arguments, "--output", str(tmp_path / "adapter")])
    model = PeftModel.from_pretrained(pair.load_base(), tmp_path / "adapter").eval()
    for name, tensor in tensors.items():
        found = getattr(projection_of(model), name)
        assert found.dtype == torch.float32
        assert torch.equal(found.bfloat16(), tensor)
    oracle = Oracle(pair.base, pair.assistant, tensors["weight"].float(), tensors["bias"].float(), N)
    for text, row in zip(QUESTIONS, pair.rows(QUESTIONS), strict=True):
        assert generated(model, pair.batch([text]), 5) == [oracle.generate(row, 5)]
    main([str(tmp_path / "adapter"), "--back", "--output", str(tmp_path / "back.bin")])
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_maps_by_position_become_a_base_that_reads_for_itself(pair: Pair, tmp_path: Path) -> None:
    tensors = published(tmp_path / "projection.bin", maps=3, shape=(32, 32))
    config = convert(tmp_path / "projection.bin", tmp_path / "adapter", base=str(pair.base))
    assert (config.num_thought_tokens, config.projection, config.thought_source) == (3, "per_position", "base")
    model = PeftModel.from_pretrained(pair.load_base(), tmp_path / "adapter").eval()
    batch = pair.batch(QUESTIONS)
    states, found = next_states(model, batch), soft_thoughts(model, batch)
    for place in range(3):
        weight, bias = (tensors[f"{place}.{name}"].float() for name in ("weight", "bias"))
        torch.testing.assert_close(found[:, place], states[:, place] @ weight.T + bias, atol=1e-5, rtol=1e-5)
    convert_back(tmp_path / "adapter", tmp_path / "back.bin")
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_chains_are_kept(pair: Pair, tmp_path: Path) -> None:
    tensors = published(tmp_path / "projection.bin")
    tensors["embedding"] = torch.randn(3, 24).bfloat16()
    torch.save(tensors, tmp_path / "projection.bin")
    options = {"base": str(pair.base), "assistant": str(pair.assistant), "num_thought_tokens": N}
    config = convert(tmp_path / "projection.bin", tmp_path / "adapter", **options)
    assert config.num_chains == 3
    model = PeftModel.from_pretrained(pair.load_base(), tmp_path / "adapter").eval()
    answers = [model.generate(**pair.batch([text]), max_new_tokens=5, do_sample=False) for text in QUESTIONS]
    for chain, vector in enumerate(tensors["embedding"].float()):
        oracle = Oracle(
            pair.base, pair.assistant, tensors["weight"].float(), tensors["bias"].float(), N, vector=vector
        )
        for row, found in zip(pair.rows(QUESTIONS), answers, strict=True):
            assert up_to_eos([found[chain, len(row) :].tolist()]) == [oracle.generate(row, 5)]
    convert_back(tmp_path / "adapter", tmp_path / "back.bin")
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_fixed_chains_are_written_as_the_assistants_embeddings(pair: Pair, tmp_path: Path) -> None:
    pair.model(num_chains=2, chain_init="fixed", chain_token_ids=[9, 4]).save_pretrained(tmp_path / "adapter")
    convert_back(tmp_path / "adapter", tmp_path / "back.bin", torch.float32)
    table = AutoModelForCausalLM.from_pretrained(pair.assistant).get_input_embeddings().weight
    assert torch.equal(torch.load(tmp_path / "back.bin", weights_only=True)["embedding"], table[[9, 4]])


def test_a_thought_token_can_be_named(pair: Pair, tmp_path: Path) -> None:
    published(tmp_path / "projection.bin")
    options = {"base": str(pair.base), "assistant": str(pair.assistant), "num_thought_tokens": N}
    convert(
        tmp_path / "projection.bin",
        tmp_path / "adapter",
        **options,
        thought_token="<thought>",
        placement="thought_token",
    )
    model = PeftModel.from_pretrained(pair.load_base(), tmp_path / "adapter").eval()
    with pytest.raises(ValueError, match="every prompt must hold a run"):
        generated(model, pair.batch(QUESTIONS), 1)


@pytest.mark.parametrize(
    ("stored", "options", "message"),
    [
        ({"weight": torch.zeros(32, 24)}, {}, r"must hold `weight` and `bias`.*got \['weight'\]"),
        (
            {"weight": torch.zeros(32, 24), "bias": torch.zeros(31)},
            {},
            r"bias for each row, got \(32, 24\) and \(31,\)",
        ),
        ({"weight": torch.zeros(32, 20), "bias": torch.zeros(32)}, {}, "go from 20 to 32, got models with 24 and 32"),
        ({"weight": torch.zeros(32, 24), "bias": torch.zeros(32)}, {"num_thought_tokens": None}, "must be given"),
        (
            {"weight": torch.zeros(32, 24), "bias": torch.zeros(32), "embedding": torch.zeros(2, 20)},
            {},
            "whose `embedding` is 20 wide, got one with embeddings of 24",
        ),
        (
            {"weight": torch.zeros(32, 24), "bias": torch.zeros(32), "embedding": torch.zeros(24)},
            {},
            "a vector for each chain",
        ),
        (
            {"weight": torch.zeros(32, 24), "bias": torch.zeros(32), "other": torch.zeros(24)},
            {},
            r"in SoftCoT\+\+, or .*'other'",
        ),
        (
            {"0.weight": torch.zeros(32, 24), "0.bias": torch.zeros(32)},
            {},
            "must be the number of maps in .*, 1, got 4",
        ),
        ({"weight": torch.zeros(32, 24).long(), "bias": torch.zeros(32)}, {}, "torch.int64"),
    ],
)
def test_other_files_are_rejected(
    pair: Pair, tmp_path: Path, stored: dict[str, Tensor], options: dict[str, Any], message: str
) -> None:
    torch.save(stored, tmp_path / "projection.bin")
    pair_options = {"base": str(pair.base), "assistant": str(pair.assistant), "num_thought_tokens": N} | options
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "projection.bin", tmp_path / "adapter", **pair_options)
    assert not (tmp_path / "adapter").exists()


def test_code_in_a_file_never_runs(pair: Pair, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path / "harmed").touch, ()

    torch.save({"weight": Harm()}, tmp_path / "projection.bin")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        convert(tmp_path / "projection.bin", tmp_path / "adapter", base=str(pair.base), num_thought_tokens=N)
    assert not (tmp_path / "harmed").exists()


def test_other_projections_have_no_published_form(pair: Pair, tmp_path: Path) -> None:
    pair.model(projection="mlp").save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="must have a linear projection"):
        convert_back(tmp_path / "adapter", tmp_path / "back.bin")
