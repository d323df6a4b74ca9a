"""What the documents say can be run and found: code blocks, commands, links and the tests that tables name."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from project_files import ROOT
from tiny_pair import QUESTIONS, Pair
from transformers import TrainingArguments

from softcot_peft import prompt_embeds

datasets = pytest.importorskip("datasets")

FOLDERS = (".", "docs", "evaluation", "tests")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONVERSATION = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.usefixtures("nothing_given")
def test_the_readme_s_code_runs_from_training_to_the_pipeline(pair: Pair, tmp_path: Path) -> None:
    """The blocks in their order, with the pair of the tests in the place of the named models; they give one a name."""
    labelled = [{"input_ids": row, "labels": [-100] * 6 + row[6:]} for row in pair.rows(QUESTIONS)]
    names = {
        "arguments": TrainingArguments(tmp_path / "run", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True),
        "dataset": datasets.Dataset.from_list(labelled),
        "conversations": datasets.Dataset.from_dict({"messages": [CONVERSATION]}),
        "tokenizer": pair.tokenizer,
        "my_model": pair.load_base(),
        "my_tokenizer": pair.tokenizer,
    }
    replacements = {
        "Qwen/Qwen2.5-1.5B-Instruct": str(pair.base),
        "Qwen/Qwen2.5-0.5B-Instruct": str(pair.assistant),
        "A farmer has 12 hens and buys 34 more. How many hens are there?": QUESTIONS[0],
        "my-adapter": str(tmp_path / "my-adapter"),
        "<|endoftext|>": "<thought>",
        "Trainer(model, ": "Trainer(model, arguments, ",
        "SoftCoTConfig(...,": f"SoftCoTConfig(assistant_model_name_or_path={str(pair.assistant)!r},",
        '(assistant_model_name_or_path="my-assistant", ...)': '(assistant_model_name_or_path="my-assistant")',
    }
    for block in BLOCKS:
        for name, ours in replacements.items():
            block = block.replace(name, ours)
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
    assert names["rows"].num_rows == 2
    (answer,) = names["pipe"](QUESTIONS[0], max_new_tokens=2)
    assert answer["generated_text"].startswith(QUESTIONS[0])


@pytest.mark.usefixtures("nothing_given")
def test_the_code_of_the_page_on_prompts_runs(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks in their order, with the pair of the tests in the place of the named models."""
    page = (ROOT / "docs" / "prompts.md").read_text(encoding="utf-8")
    replacements = {
        "Qwen/Qwen2.5-7B-Instruct": str(pair.base),
        "Qwen/Qwen2.5-1.5B-Instruct": str(pair.assistant),
        "<|endoftext|>": "<thought>",
        'assistant_thought_token="<thought>"': 'assistant_thought_token="[EOS]"',
    }
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        for name, ours in replacements.items():
            block = block.replace(name, ours)
        exec(compile(block, "prompts.md", "exec"), names)
    run, question = "<thought>" * 4, names["question"]
    expected = [
        f"{question}{run}<|end|><|assistant|>",
        f"{question}\n\nA smaller model notes:\n<|box_start|>{run}<|box_end|><|end|><|assistant|>",
        f"Hints: [{run}]\n\n{question}<|end|><|assistant|>",
        f"{question}<|end|><|assistant|><think>{run}</think>",
    ]
    assert capsys.readouterr().out == "".join(f"<|user|>{text}\n" for text in expected)
    assert names["thoughts"].column_names[-1] == "thoughts_fingerprint"
    assert names["model"].peft_config["default"].assistant_prefix == "In {num_thought_tokens} tokens:"


@pytest.mark.usefixtures("nothing_given")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
@pytest.mark.parametrize("page", ["placement", "extensions", "serving"])
def test_the_code_of_a_page_runs(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    """The blocks in their order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/base").symlink_to(pair.base)
    (tmp_path / "path/to/assistant").symlink_to(pair.assistant)
    text, names = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8"), {"__name__": page}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, f"{page}.md", "exec"), names)


def test_the_body_for_sglang_holds_the_embeddings(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's block writes what a server reads: float32 numbers, equal to those of the loaded model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/base").symlink_to(pair.base)
    model = pair.model()
    model.save_pretrained("my-adapter")
    section = (ROOT / "docs/serving.md").read_text(encoding="utf-8").partition("## SGLang")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    exec(compile(block, "serving.md", "exec"), {"tokenizer": pair.tokenizer})
    body = json.loads(Path("body.json").read_text(encoding="utf-8"))
    assert set(body) == {"input_embeds", "sampling_params"}
    assert body["sampling_params"] == {"temperature": 0, "max_new_tokens": 64}
    (expected,) = prompt_embeds(model, **pair.batch(["How many legs have seven dogs?"]))
    assert torch.equal(torch.tensor(body["input_embeds"]), expected)
    half = expected.bfloat16()
    again = torch.tensor(json.loads(json.dumps(half.float().tolist()))).bfloat16()
    assert torch.equal(again, half)


def test_every_command_of_make_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {
        name for page in DOCUMENTS for name in re.findall(r"`?make ([a-z]+)\b(?=`| {2,})", page.read_text("utf-8"))
    }
    assert {"test", "quickstart"} <= named <= targets


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_every_link_and_file_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    scripts = re.findall(r"`(?:python )?((?:examples|tests|docs|evaluation)/[\w/.-]+\.\w+)", text)
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_every_test_that_is_named_exists() -> None:
    defined = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for page in DOCUMENTS:
        named = re.findall(r"\btest_\w+(?:\.py)?", page.read_text(encoding="utf-8"))
        assert [name for name in named if name not in defined] == [], page.name
