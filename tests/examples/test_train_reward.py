"""The example of reward training on a few problems and steps, and the code of docs/reward.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import sources_of
from peft import PeftConfig
from project_files import EXAMPLES, ROOT, load_example

pytest.importorskip("datasets")
pytest.importorskip("trl")
train_reward = load_example("train_reward")
PAGE = (ROOT / "docs" / "reward.md").read_text(encoding="utf-8")

pytestmark = [
    # Trainer's own, on a CPU without CUDA
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"),
    # TRL 1.16 turns it on by default, under the name that transformers 5.23 renames
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
]


def test_a_poor_adapter_earns_more_after_a_few_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--seed 1 --steps 16 --prompts 8 --held-out 60 --output-dir"
    train_reward.main([*options.split(), str(tmp_path)])
    printed = capsys.readouterr().out
    values = {name: float(value) for name, value in re.findall(r"^\| ([^|\n]+) \| ([01]\.\d{3}) \|", printed, re.M)}
    before, after, *controls = values.values()
    assert list(values)[:2] == ["SoftCoT, before", "SoftCoT, after"]
    assert before < 0.3
    assert after > before + 0.1
    assert len(controls) == 3
    assert max(controls) < 0.1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" A: 12+34=046;046*5=0230", 1.0),
        (" A: 0230", 0.0),
        (" A: 12+34=046;046*5=0231", 0.0),
        ("=0230", 1.0),
        ("", 0.0),
    ],
)
def test_only_the_right_result_is_rewarded(text: str, value: float) -> None:
    assert train_reward.reward([text], [" A: 12+34=046;046*5=0230"], prompts=["Q"]) == [value]


@pytest.mark.usefixtures("nothing_given")
def test_the_page_s_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block.replace('"max_steps": 20', '"max_steps": 1'), "reward.md", "exec"), names)
    assert sorted(sources_of(names["model"])) == ["default", "ref"]
    assert PeftConfig.from_pretrained(str(tmp_path / "runs/my-adapter")).num_thought_tokens == 8
    assert not (tmp_path / "runs/my-adapter/ref").exists()
