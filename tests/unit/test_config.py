"""`SoftCoTConfig` as data: what is accepted, what is written and what is read back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, TaskType
from tiny_pair import Pair

import softcot_peft
from softcot_peft import SoftCoTConfig

NOT_DEFAULTS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base",
    "revision": "0123abc",
    "inference_mode": True,
    "assistant_model_name_or_path": "org/assistant",
    "assistant_revision": "v2",
    "num_thought_tokens": 6,
    "inference_num_thought_tokens": 3,
    "thought_token": "<thought>",
    "placement": "thought_token",
    "response_marker": None,  # as `placement` wants it
    "assistant_prompt": "Think of {prompt} in {num_thought_tokens} steps: é, \n, {other}",
    "assistant_prefix": "A hint of {num_thought_tokens} tokens:",
    "assistant_prompt_between": ["Q: ", "\n"],
    "assistant_thought_token": "[UNK]",
    "assistant_shares_tokenizer": False,
    "tokenizer_name_or_path": "org/tokenizer",
    "assistant_dtype": "bfloat16",
    "thought_source": "own",
    "projection": "mlp",
    "projection_init": "zero",
    "init_weights": True,  # as `projection_init` wants it
    "two_pass_training": False,
    "num_chains": 3,
    "chain_init": "fixed",
    "chain_token_ids": [7, 5, 11],
    "contrastive_weight": 0.5,
    "assistant_hidden_size": 24,
    "base_hidden_size": 32,
    "softcot_peft_version": "0.0.1",
}
OF_PEFT = {"auto_mapping", "peft_type", "peft_version"}  # fields that PEFT fills in by itself


def test_only_the_assistant_is_required() -> None:
    config = SoftCoTConfig(assistant_model_name_or_path="org/assistant")
    assert config.peft_type is PeftType.SOFTCOT
    assert (config.num_thought_tokens, config.inference_num_thought_tokens) == (32, None)
    assert (config.placement, config.thought_token, config.assistant_prompt) == ("prompt_end", None, None)
    assert (config.assistant_dtype, config.init_weights, config.task_type) == ("auto", True, None)


def test_every_field_is_documented_and_explained() -> None:
    own = {field.name for field in dataclasses.fields(SoftCoTConfig)}
    own -= {field.name for field in dataclasses.fields(PeftConfig)}
    assert own == NOT_DEFAULTS.keys() - {field.name for field in dataclasses.fields(PeftConfig)}
    for field in dataclasses.fields(SoftCoTConfig):
        if field.name in own:
            assert f"{field.name}:" in (SoftCoTConfig.__doc__ or "")
            assert field.metadata["help"].endswith(".")


@pytest.mark.parametrize("reader", [SoftCoTConfig, PeftConfig])
def test_every_field_survives_saving_and_loading(tmp_path: Path, reader: type[PeftConfig]) -> None:
    config = SoftCoTConfig(**NOT_DEFAULTS)
    config.save_pretrained(str(tmp_path))
    loaded = reader.from_pretrained(str(tmp_path))
    assert type(loaded) is SoftCoTConfig
    assert loaded.to_dict() == config.to_dict()
    assert {name: getattr(loaded, name) for name in NOT_DEFAULTS} == NOT_DEFAULTS


def test_the_file_holds_the_fields_and_no_target_modules(tmp_path: Path) -> None:
    SoftCoTConfig(**NOT_DEFAULTS).save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert written.keys() == NOT_DEFAULTS.keys() | OF_PEFT
    assert {name: written[name] for name in NOT_DEFAULTS} == NOT_DEFAULTS
    assert written["peft_type"] == "SOFTCOT"
    assert "target_modules" not in written
    assert SoftCoTConfig(**NOT_DEFAULTS).target_modules is None


def test_a_saved_adapter_says_what_it_takes_to_load_it(pair: Pair, tmp_path: Path) -> None:
    pair.model(num_thought_tokens=5).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    expected = {
        "base_model_name_or_path": str(pair.base),
        "assistant_model_name_or_path": str(pair.assistant),
        "assistant_hidden_size": 24,
        "base_hidden_size": 32,
        "num_thought_tokens": 5,
        "softcot_peft_version": softcot_peft.__version__,
    }
    assert {name: written[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.bfloat16, "bfloat16"),
        (torch.float16, "float16"),
        ("torch.float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("auto", "auto"),
    ],
)
def test_dtypes_are_kept_by_their_names(tmp_path: Path, given: Any, kept: str) -> None:
    config = SoftCoTConfig(assistant_model_name_or_path="org/assistant", assistant_dtype=given)
    assert config.assistant_dtype == kept
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["assistant_dtype"] == kept


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", TaskType.CAUSAL_LM])
def test_the_task_is_causal_language_modelling_or_left_open(task_type: Any) -> None:
    assert SoftCoTConfig(assistant_model_name_or_path="x", task_type=task_type).task_type == task_type


def test_a_changed_copy_is_checked_too() -> None:
    config = SoftCoTConfig(assistant_model_name_or_path="x")
    assert dataclasses.replace(config, num_thought_tokens=7).num_thought_tokens == 7
    with pytest.raises(ValueError, match="num_thought_tokens"):
        dataclasses.replace(config, num_thought_tokens=0)


def test_a_loaded_config_is_the_one_that_was_trained(pair: Pair, tmp_path: Path) -> None:
    model = pair.model(inference_num_thought_tokens=2, thought_token="<thought>")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pair.load_base(), tmp_path).peft_config["default"]
    saved = model.peft_config["default"]
    # PEFT sets `inference_mode` on what it loads.
    assert loaded.to_dict() | {"inference_mode": None} == saved.to_dict() | {"inference_mode": None}
