"""Fourteen unlike families as bases, and the table of all of them; `make conformance` runs the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from conformance.families import TYPES, build
from conformance.holding import check_base_as_source, check_family, make_assistant
from conformance.table import read
from transformers import PreTrainedModel

FAMILIES = {
    "bart": "no position ids; its loss compares each label with its own column",
    "bloom": "ALiBi",
    "codegen": "a config without special tokens",
    "deepseek_v3": "latent attention, mixture of experts",
    "emu3": "the text model of a wrapper",
    "gemma3n_text": "scaled and per-layer embeddings, sliding windows, several streams of states",
    "gpt_neox": "a decoder with the field that tells encoders from decoders",
    "jamba": "attention, state space and mixture of experts",
    "mamba2": "state space alone: a cache that does not count",
    "openai-gpt": "no cache",
    "opt": "learned positions, counted from the mask",
    "qwen3_next": "linear attention",
    "roberta": "an encoder as decoder; counts positions from its padding id on",
    "rwkv": "a recurrent state that is no cache of transformers'",
}


@pytest.fixture(scope="module")
def assistant() -> PreTrainedModel:
    return make_assistant()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_holds(model_type: str, assistant: PreTrainedModel, tmp_path: Path) -> None:
    check_family(build(model_type), assistant, tmp_path)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_its_own_source(model_type: str) -> None:
    check_base_as_source(build(model_type))


def test_the_table_of_families_has_a_row_for_every_type() -> None:
    head, rows = read()
    if f"transformers {transformers.__version__}," not in head:
        pytest.skip(f"the table in docs/support.md was not made with transformers {transformers.__version__}")
    assert rows.keys() == set(TYPES)
    results = [row.split("|")[3].strip() for row in rows.values()]
    assert f"{len(TYPES)} types: {results.count('works')} works" in head
