"""What is saved: the projection and a config that is enough; nothing of base or assistant."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from helpers import projection_of
from peft import PeftConfig
from safetensors.torch import load_file
from saved_adapters import (
    PROMPTS,
    N,
    Saved,
    SavedChat,
    check_projection_alone,
    projection_in,
    written,
)
from tiny_pair import Pair
from torch import Tensor

from softcot_peft import SoftCoTConfig, __version__

# What is saved


def test_weights_file_holds_the_projection_alone(saved: Saved) -> None:
    check_projection_alone(saved.folder)
    for name, tensor in projection_in(saved.folder).items():
        assert torch.equal(tensor, projection_of(saved.model).state_dict()[name.split(".")[-1]])
    assert {path.name for path in saved.folder.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }


def test_adapter_config_holds_what_loading_needs(pair: Pair, chat: SavedChat) -> None:
    stored = json.loads((chat.folder / "adapter_config.json").read_text())
    needed = {
        "peft_type": "SOFTCOT",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(pair.base),
        "assistant_model_name_or_path": str(pair.assistant),
        "assistant_revision": None,  # a folder has no commit
        "assistant_hidden_size": 24,
        "base_hidden_size": 32,
        "num_thought_tokens": N,
        "inference_num_thought_tokens": None,
        "thought_token": "<thought>",
        "placement": "thought_token",
        "assistant_prompt": None,
        "assistant_thought_token": None,
        "softcot_peft_version": __version__,
        "inference_mode": True,
    }
    assert {name: stored.get(name, "absent") for name in needed} == needed
    loaded = PeftConfig.from_pretrained(chat.folder)
    assert isinstance(loaded, SoftCoTConfig)


def test_assistant_is_no_part_of_the_model_or_of_any_file(pair: Pair, tmp_path: Path) -> None:
    model = pair.model()
    written(model, pair.batch(PROMPTS))  # loads the assistant
    model.save_pretrained(tmp_path / "peft")
    base = pair.load_base()
    base.add_adapter(pair.config())
    written(base, pair.batch(PROMPTS))
    base.save_pretrained(tmp_path / "transformers")
    torch.save(model.state_dict(), tmp_path / "state.pt")

    assistant = load_file(pair.assistant / "model.safetensors")
    plain = pair.load_base()
    own = {"base_layer.weight": "weight"}  # the wrapped embedding's name
    for holder in (model, base):
        expected = {name for name, _ in plain.named_parameters()}
        found = {name.removeprefix("base_model.model.") for name, _ in holder.named_parameters()}
        extra = {name for name in found if "softcot_" in name}
        assert {name.replace(*next(iter(own.items()))) for name in found - extra} == expected
        assert {name.rpartition("softcot_")[2] for name in extra} == {
            "projection.default.weight",
            "projection.default.bias",
        }
        assert holder.state_dict().keys() == {name for name, _ in holder.named_parameters()}
        assert not any("qwen" in type(module).__name__.lower() for module in holder.modules())
        assert not any("assistant" in name for name, _ in holder.named_modules())
        check_free_of(holder.state_dict(), assistant)
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".pt", ".bin", ".pth")]
    assert len(files) == 3
    for file in files:
        check_free_of(load_file(file) if file.suffix == ".safetensors" else torch.load(file), assistant)


def check_free_of(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """No tensor has the shape and values of one of the others, but for norms' ones and biases' zeros."""
    for name, tensor in tensors.items():
        for other_name, other in others.items():
            if other.unique().numel() > 1:
                assert not (tensor.shape == other.shape and torch.equal(tensor, other)), (name, other_name)


def test_model_card_says_to_import_the_package_and_its_code_runs(pair: Pair, saved: Saved) -> None:
    card = (saved.folder / "README.md").read_text(encoding="utf-8")
    assert "import softcot_peft" in card.partition("# SoftCoT adapter")[2][:400]
    assert str(pair.base.parent) not in card  # folders of this machine
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        block = block.replace("the base model", str(pair.base))
        exec(block.replace("this repository or folder", str(saved.folder)), names)
    for model in (names["model"].eval(), names["pipe"].model):
        assert written(model, pair.batch(PROMPTS)) == saved.plain


def test_without_the_import_peft_says_that_it_does_not_know_the_method(pair: Pair, saved: Saved) -> None:
    program = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, folder = sys.argv[1:]
for load in (
    lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
    lambda: AutoModelForCausalLM.from_pretrained(base).load_adapter(folder),
    lambda: AutoModelForCausalLM.from_pretrained(folder),
):
    try:
        load()
    except KeyError as error:
        print(error)
    else:
        print("loaded")
"""
    command = [sys.executable, "-c", program, str(pair.base), str(saved.folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=saved.folder)
    assert result.stdout.splitlines() == ["'SOFTCOT'"] * 3
