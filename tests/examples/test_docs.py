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
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from softcot_peft import prompt_embeds

datasets = pytest.importorskip("datasets")

FOLDERS = (".", "docs", "evaluation", "tests")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

# Pages with code; those with a test of their own are left out: two below, and the guide to the Hub in test_hub.py.
WITH_CODE = [path.stem for path in sorted((ROOT / "docs").glob("*.md")) if "```python" in path.read_text("utf-8")]
PAGES = [page for page in WITH_CODE if page not in ("prompts", "quantized-bases", "sharing")]
# What stands for the models that pages name, and for their thought token.
STAND_INS = {
    "Qwen/Qwen2.5-1.5B-Instruct": "path/to/base",
    "Qwen/Qwen2.5-0.5B-Instruct": "path/to/assistant",
    "<|endoftext|>": "<thought>",
}
CHANGES = {
    "reward": {
        '"max_steps": 20': '"max_steps": 1, "disable_tqdm": True',
        "per_device_train_batch_size=64": "per_device_train_batch_size=8",
    },
    "training": {'report_to="none"': 'report_to="none", use_cpu=True, bf16=False, disable_tqdm=True'},
    "quickstart": {'report_to="none"': 'report_to="none", disable_tqdm=True'},
    "support": {
        "tuned = ": (
            "from peft import LoraConfig, PeftModel, get_peft_model\n"
            "from softcot_peft import SoftCoTConfig\n"
            "from transformers import AutoModelForCausalLM\n"
            "base = AutoModelForCausalLM.from_pretrained('path/to/base')\n"
            "tuned = "
        ),
        "LoraConfig(...)": "LoraConfig(target_modules=['q_proj'])",
        "SoftCoTConfig(...)": "SoftCoTConfig(assistant_model_name_or_path='path/to/assistant')",
        "base.load_adapter": "base = AutoModelForCausalLM.from_pretrained('path/to/base')\nbase.load_adapter",
    },
}


@pytest.mark.usefixtures("nothing_given")
def test_the_readme_s_code_runs_from_training_to_the_pipeline(pair: Pair, tmp_path: Path) -> None:
    """The blocks in their order, with the pair of the tests in the place of the named models; they give one a name."""
    names = {
        "arguments": TrainingArguments(tmp_path / "run", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True),
        "tokenizer": pair.tokenizer,
    }
    replacements = {
        "Qwen/Qwen2.5-1.5B-Instruct": str(pair.base),
        "Qwen/Qwen2.5-0.5B-Instruct": str(pair.assistant),
        "A farmer has 12 hens and buys 34 more. How many hens are there?": QUESTIONS[0],
        "my-adapter": str(tmp_path / "my-adapter"),
        "Trainer(model, ": "Trainer(model, arguments, ",
    }
    for block in BLOCKS:
        for name, ours in replacements.items():
            block = block.replace(name, ours)
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
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
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL's name of an argument, in its config
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    """The blocks in their order, in a folder that holds nothing but the pair of the tests and examples/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/base").symlink_to(pair.base)
    (tmp_path / "path/to/assistant").symlink_to(pair.assistant)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    text, names = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8"), {"__name__": page}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        for name, ours in (STAND_INS | CHANGES.get(page, {})).items():
            block = block.replace(name, ours)
        exec(compile(block, f"{page}.md", "exec"), names)


@pytest.mark.usefixtures("nothing_given")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.filterwarnings("ignore:.*bitsandbytes.*:UserWarning")
def test_the_code_of_the_page_on_quantized_bases_runs(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With models whose sizes the kernels take: multiples of 32."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.chdir(tmp_path)
    for name in ("base", "assistant"):
        config = LlamaConfig(
            vocab_size=len(pair.tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            eos_token_id=1,
        )
        LlamaForCausalLM(config).save_pretrained(f"path/to/{name}")
        pair.tokenizer.save_pretrained(f"path/to/{name}")
    page, names = (ROOT / "docs/quantized-bases.md").read_text(encoding="utf-8"), {"__name__": "quantized"}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "quantized-bases.md", "exec"), names)
    assert Path("my-adapter/adapter_model.safetensors").exists()


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
