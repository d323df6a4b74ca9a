"""`SoftCoTLLM`: the tokens of `generate` in float32, for everything that `vllm.LLM` takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from project_files import ROOT, process_environment
from served import BASE, NEW, PROMPTS, RUN_TEXT, Served, message, skip_without_vllm

skip_without_vllm()

CHATS = [message(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def answers(served: Served) -> dict[str, Any]:
    """Answers to several requests in one process, by what is asked."""
    asked: dict[str, dict[str, Any]] = {}
    for name in ("first", "second", "shared", "chatting", None):
        asked[f"{name} texts"] = {"prompts": PROMPTS, "adapter": name}
        asked[f"{name} chats"] = {"messages": CHATS, "adapter": name}
    asked["one text"] = {"prompts": PROMPTS[0], "adapter": "first"}
    asked["one chat"] = {"messages": CHATS[0], "adapter": "first"}
    asked["ids"] = {"prompts": served.ids(PROMPTS[0]), "adapter": "first"}
    asked["dicts"] = {"prompts": [{"prompt": PROMPTS[0]}], "adapter": "first"}
    asked["run"] = {"prompts": PROMPTS[0] + RUN_TEXT, "adapter": "run"}
    asked["run chat"] = {"messages": CHATS[0], "adapter": "run"}
    asked["no run"] = {"prompts": PROMPTS[0], "adapter": "run"}
    asked["unknown"] = {"prompts": PROMPTS[0], "adapter": "third"}
    requests = [{**request, "max_tokens": NEW} for request in asked.values()]
    adapters = {name: str(path) for name, path in served.adapters.items() if name != "failing"}
    command = [sys.executable, str(ROOT / "tests/answer_offline.py"), str(served.pair.base)]
    ran = subprocess.run(
        [*command, json.dumps(adapters), json.dumps(requests)],
        env=process_environment() | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, ran.stdout[-2000:] + ran.stderr[-2000:]
    (shown,) = [line.removeprefix("REPR ") for line in ran.stdout.splitlines() if line.startswith("REPR ")]
    return dict(zip(asked, json.loads(lines[0].removeprefix("ANSWERS ")), strict=True)) | {"repr": shown}


@pytest.mark.parametrize("name", ["first", "second", "shared", "chatting", None])
def test_answers_are_those_of_generate(served: Served, answers: dict[str, Any], name: str | None) -> None:
    for kind in ("texts", "chats"):
        rows = [served.ids(prompt, chat=kind == "chats") for prompt in PROMPTS]
        found = answers[f"{name} {kind}"]
        assert [answer["tokens"] for answer in found] == [served.answer(name or BASE, row) for row in rows]
        assert [answer["prompt"] for answer in found] == [list(row) for row in rows]
    assert [answer["text"] for answer in answers[f"{name} texts"]] == PROMPTS


def test_one_prompt_ids_and_dicts(served: Served, answers: dict[str, Any]) -> None:
    expected = served.answer("first", served.ids(PROMPTS[0]))
    for case in ("one text", "ids", "dicts"):
        (answer,) = answers[case]
        assert answer["tokens"] == expected
    (answer,) = answers["one chat"]
    assert answer["tokens"] == served.answer("first", served.ids(PROMPTS[0], chat=True))


def test_it_names_its_base_and_adapters(served: Served, answers: dict[str, Any]) -> None:
    names = sorted(name for name in served.adapters if name != "failing")
    assert answers["repr"] == f"SoftCoTLLM({str(served.pair.base)!r}, adapters={names})"


def test_runs_in_prompts_and_in_the_adapters_template(served: Served, answers: dict[str, Any]) -> None:
    (answer,) = answers["run"]
    assert answer["tokens"] == served.answer("run", served.ids(PROMPTS[0] + RUN_TEXT))
    (answer,) = answers["run chat"]
    assert answer["tokens"] == served.answer("run", served.ids(PROMPTS[0], chat=True, name="run"))


def test_what_cannot_be_answered_says_why(answers: dict[str, Any]) -> None:
    assert "every prompt must hold a run" in answers["no run"]
    assert "`adapter` must be one of those that the engine was started with" in answers["unknown"]


def test_the_code_of_the_page_runs(served: Served, tmp_path: Path) -> None:
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/base").symlink_to(served.pair.base)
    (tmp_path / "my-adapter").symlink_to(served.adapters["first"])
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "script.py").write_text(block, encoding="utf-8")
    variables = process_environment() | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=variables, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()[-2000:]
    assert ran.stdout.strip()
