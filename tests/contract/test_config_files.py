"""Fields of saved configs: paths, overrides that PEFT would ignore, saves that were interrupted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from one_question import PROMPT, answer, save_and_answer
from oracle import Oracle
from peft import PeftModel
from tiny_pair import Pair

from softcot_peft import SoftCoTConfig


@pytest.fixture
def saved(pair: Pair, tmp_path: Path) -> tuple[Path, list[int]]:
    """A saved adapter, and the oracle's tokens."""
    return save_and_answer(pair, tmp_path / "adapter")


# Words


@pytest.mark.parametrize("field", ["assistant_model_name_or_path", "tokenizer_name_or_path"])
def test_a_path_is_taken_for_a_folder(pair: Pair, field: str, tmp_path: Path) -> None:
    folder = pair.assistant if field.startswith("assistant") else pair.base
    config = pair.config(**{field: folder})
    assert getattr(config, field) == str(folder)
    config.save_pretrained(str(tmp_path))
    assert getattr(SoftCoTConfig.from_pretrained(str(tmp_path)), field) == str(folder)


@pytest.mark.parametrize(
    "load",
    [
        lambda pair, folder, **o: PeftModel.from_pretrained(pair.load_base(), folder, **o),
        lambda pair, folder, **o: SoftCoTConfig.from_pretrained(folder, **o),
    ],
)
@pytest.mark.parametrize("field", ["num_thought_tokens", "inference_num_thought_tokens", "thought_token"])
def test_overrides_that_peft_would_ignore_are_refused(
    pair: Pair, saved: tuple[Path, list[int]], load: Callable[..., Any], field: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"got \['{field}'\], which PEFT ignores.*set `config\.{field}`.*config=config"
    ):
        load(pair, str(saved[0]), **{field: 2})
    config = SoftCoTConfig.from_pretrained(str(saved[0]))
    config.inference_num_thought_tokens = 2
    model = PeftModel.from_pretrained(pair.load_base(), saved[0], config=config)
    (prompt,) = pair.rows([PROMPT])
    assert answer(model, pair) == Oracle.of(model, pair.base, pair.assistant, 2).generate(prompt, 6)


def test_a_save_that_version_0_1_was_killed_in_is_named(pair: Pair, saved: tuple[Path, list[int]]) -> None:
    config = saved[0] / "adapter_config.json"
    config.write_text(config.read_text().replace("{", '{"interrupted_save": true,', 1))
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"0\.1\.0 that was killed.*`\.softcot-staged`"):
        PeftModel.from_pretrained(pair.load_base(), saved[0])
