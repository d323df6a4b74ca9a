"""Examples in docstrings: every public name has one, and every example of the package runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import Dataset
from peft import PeftModel
from tiny_pair import QUESTIONS, Pair
from transformers import AutoTokenizer

import softcot_peft
from softcot_peft import analysis, live_rows, serving, sources, split_conversations

NEED_VLLM = f"{serving.__name__}.vllm."  # tests/serving/ runs their examples
FOUND = [found.name for found in pkgutil.walk_packages(softcot_peft.__path__, "softcot_peft.")]
MODULES = ["softcot_peft", *(name for name in FOUND if not name.startswith(NEED_VLLM))]
PUBLIC = {name: getattr(softcot_peft, name) for name in softcot_peft.__all__}
EXTENSIONS = {name: getattr(sources, name) for name in ("ThoughtSource", "register_projection", "register_source")}
NEED_EXAMPLES = {name: member for name, member in (PUBLIC | EXTENSIONS).items() if callable(member)}
# test_analysis.py runs the examples of the first two, test_conversations.py that of the third.
RUN_ELSEWHERE = (f"{analysis.__name__}.", f"{live_rows.__name__}.", f"{split_conversations.__module__}.")


def blocks(member: Any) -> list[str]:
    """The ```python blocks of a docstring."""
    return [
        textwrap.dedent(code) for code in re.findall(r"```python\n(.*?)```", member.__doc__ or "", flags=re.DOTALL)
    ]


def members(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The functions, the classes and the methods that a module defines."""
    for name, member in vars(module).items():
        if getattr(member, "__module__", None) == module.__name__:
            yield name, member
            methods = vars(member).items() if inspect.isclass(member) else ()
            yield from ((f"{name}.{key}", method) for key, method in methods if inspect.isfunction(method))


EXAMPLES = {
    f"{module}.{name}": code
    for module in MODULES
    for name, member in members(importlib.import_module(module))
    for code in blocks(member)
    if not f"{module}.{name}".startswith(RUN_ELSEWHERE)
}


def test_doctests_pass() -> None:
    results = {name: doctest.testmod(importlib.import_module(name)) for name in MODULES}
    assert {name: result for name, result in results.items() if result.failed} == {}
    assert results["softcot_peft.config"].attempted > 0


@pytest.mark.parametrize("name", NEED_EXAMPLES)
def test_every_public_name_has_an_example(name: str) -> None:
    member = NEED_EXAMPLES[name]
    assert blocks(member) or ">>> " in member.__doc__


@pytest.mark.usefixtures("nothing_given")
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(
    pair: Pair, model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/base").symlink_to(pair.base)
    (tmp_path / "path/to/assistant").symlink_to(pair.assistant)
    names = {
        "__name__": "example",
        "base": pair.load_base(),
        "config": pair.config(),
        "dataset": Dataset.from_dict({"input_ids": pair.rows(QUESTIONS)}),
        "model": model,
        "prompts": QUESTIONS,
        "tokenizer": AutoTokenizer.from_pretrained(pair.base),
    }
    exec(compile(EXAMPLES[name], name, "exec"), names)
