"""Adapters saved by 0.1.0 load through every route, and generate the tokens that 0.1.0 generated.

`fixtures/make.py` says how the files were made.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from softcot_peft import SoftCoTConfig
from softcot_peft.analysis import with_thoughts

FOLDER = Path(__file__).parents[1] / "fixtures" / "0.1.0"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
ADAPTERS = sorted(EXPECTED["adapters"])


@pytest.fixture(autouse=True)
def _working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapters' configs name base and assistant relative to it."""
    monkeypatch.chdir(FOLDER)


def load_base() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)


def through_peft(adapter: str) -> Any:
    return PeftModel.from_pretrained(load_base(), adapter)


def through_auto_class(adapter: str) -> Any:
    return AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)


def through_transformers(adapter: str) -> Any:
    base = load_base()
    base.load_adapter(adapter)
    return base


def through_adapter_folder(adapter: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)


def generate(model: Any, prompts: list[str], new: int) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained("base")
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    tokens = model.generate(**batch, max_new_tokens=new, do_sample=False)
    return tokens[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("load", [through_peft, through_auto_class, through_transformers, through_adapter_folder])
def test_the_tokens_are_those_of_0_1_0(adapter: str, load: Callable[[str], Any]) -> None:
    model, expected = load(adapter).eval(), EXPECTED["adapters"][adapter]
    prompts, tokens = expected["prompts"], expected["tokens"]
    assert generate(model, prompts, len(tokens[0])) == tokens
    for prompt, row in zip(prompts, tokens, strict=True):
        assert generate(model, [prompt], len(row)) == [row]


def test_without_thoughts_the_tokens_are_others() -> None:
    plain = EXPECTED["base"]
    assert generate(load_base(), plain["prompts"], len(plain["tokens"][0])) == plain["tokens"]
    every = [plain["tokens"], *(expected["tokens"] for expected in EXPECTED["adapters"].values())]
    assert all(len({tuple(rows[place]) for rows in every}) == len(every) for place in range(len(plain["prompts"])))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_tokens_depend_on_the_question_that_the_assistant_reads(adapter: str) -> None:
    model, expected = through_peft(adapter).eval(), EXPECTED["adapters"][adapter]
    with with_thoughts(model, "other_question"):
        found = generate(model, expected["prompts"], len(expected["tokens"][0]))
    assert not any(map(list.__eq__, found, expected["tokens"]))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_adapters_are_as_0_1_0_saved_them(adapter: str) -> None:
    config = json.loads((FOLDER / adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["softcot_peft_version"] == "0.1.0"
    named = [config[name] for name in ("base_model_name_or_path", "assistant_model_name_or_path")]
    assert all((FOLDER / name).is_dir() and not Path(name).is_absolute() for name in named)
    assert isinstance(SoftCoTConfig.from_pretrained(adapter), SoftCoTConfig)


def test_the_fixtures_are_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 300_000
