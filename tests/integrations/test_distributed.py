"""Two processes train what one does, under DDP; assistants are whole under engines that shard what is loaded.

The engines that shard are in `conformance/test_engines.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engines import ZERO3, Runs, check_same
from helpers import find_assistant, is_whole, loaded_whole, projection_of
from tiny_pair import QUESTIONS, Pair
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed
from transformers.integrations.fsdp import is_fsdp_enabled

from softcot_peft import use_assistant

LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def test_two_processes_train_what_one_trains(pair: Pair, tmp_path: Path) -> None:
    check_same(Runs(pair, tmp_path), "ddp", tmp_path / "ddp")


class ZeRO3:
    """What makes transformers partition the models that it loads."""

    config = ZERO3

    def is_zero3(self) -> bool:
        return True


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_thoughts_are_projected_where_fsdp2_gathers_the_projection(pair: Pair, group: None) -> None:
    model, batch = pair.model(), pair.batch(QUESTIONS[:2])
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    expected = model(**batch, logits_to_keep=1).logits
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model.get_input_embeddings(), mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert not is_whole(projection_of(model).weight)
    torch.testing.assert_close(model(**batch, logits_to_keep=1).logits, expected)
    own = torch.zeros(2, 6, dtype=torch.long)
    with pytest.raises(RuntimeError, match="pass `input_ids` instead of `inputs_embeds`"):
        model(inputs_embeds=embeddings, assistant_input_ids=own, logits_to_keep=1)
    torch.testing.assert_close(model(**batch, logits_to_keep=1).logits, expected)


def think(pair: Pair, dtype: str) -> Tensor:
    """The assistant's hidden states; assistants of one dtype are one, so that each test loads its own."""
    ids = torch.tensor([[2, 5, 7, 9, 0, 0]])
    return find_assistant(str(pair.assistant), dtype=dtype).hidden_states(ids, ids.new_ones(1, 6), 2, ids.device)


def test_an_assistant_is_loaded_whole_while_zero3_is_on(pair: Pair) -> None:
    expected, engine = think(pair, "auto"), ZeRO3()
    deepspeed.set_hf_deepspeed_config(engine)
    try:
        assert find_assistant(str(pair.assistant), dtype="float32").hidden_size == 24
        found = think(pair, "float32")
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
    torch.testing.assert_close(found, expected)


def test_an_assistant_is_loaded_whole_while_fsdp_loads_in_little_memory(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, group: None
) -> None:
    expected = think(pair, "auto")
    for name, value in {"ACCELERATE_USE_FSDP": "true", LOADING: "true", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert is_fsdp_enabled()
    with loaded_whole():
        assert not is_fsdp_enabled()
    assert is_fsdp_enabled()
    torch.testing.assert_close(think(pair, "float32"), expected)


def test_a_partitioned_assistant_without_an_engine_is_refused(pair: Pair) -> None:
    assistant = AutoModelForCausalLM.from_pretrained(pair.assistant)
    for weight in assistant.parameters():  # what ZeRO-3 leaves
        weight.ds_shape = weight.shape
        weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="`model` must be whole, but the weights of 'partitioned' are partitioned"):
        use_assistant(assistant, name="partitioned")


def test_a_partitioned_base_keeps_its_width(pair: Pair, tmp_path: Path) -> None:
    model = pair.model()
    weight = model.get_input_embeddings().base_layer.weight
    weight.ds_shape = weight.shape
    weight.data = torch.empty(0)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["assistant_hidden_size"], config["base_hidden_size"]) == (24, 32)
