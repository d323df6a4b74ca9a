"""The notebooks run from top to bottom, and what they show was written by the code that they show."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from project_files import EXAMPLES, ROOT, load_example, process_environment
from tiny_pair import Pair

pytest.importorskip("matplotlib")

FOLDER = EXAMPLES / "notebooks"
NAMES = ("train.ipynb", "serve.ipynb")  # in this order: the second uses the adapter that the first one saves
SMALLER = {"steps = 300": "steps = 2", "held_out = 100": "held_out = 8"}


def read(name: str) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return notebook


def code_of(notebook: dict[str, Any]) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(name: str) -> dict[str, Any]:
    """Run the code cells in their order in one namespace; an expression at a cell's end is shown, as in Jupyter."""
    names: dict[str, Any] = {"__name__": name, "shown": []}
    for code in code_of(read(name)):
        for line, less in SMALLER.items():
            code = code.replace(line, less)
        tree = ast.parse(code)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
            names["shown"] += [] if value is None else [value]
    return names


@pytest.mark.filterwarnings("ignore:Without `labels`, thoughts stand after:UserWarning")
def test_notebooks_run_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_example("small_pair")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pair").symlink_to(EXAMPLES / "pair")
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert all(line in code_of(read("train.ipynb"))[0] for line in SMALLER)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        trained = run("train.ipynb")
        served = run("serve.ipynb")
    figures = [shown for shown in trained["shown"] if hasattr(shown, "_repr_png_")]
    assert len(figures) == 6
    assert all(figure._repr_png_().startswith(b"\x89PNG") for figure in figures)
    text = printed.getvalue()
    assert "soft thoughts" in text
    assert "another question's" in text
    assert "(active): AssistantSource(assistant='../pair/assistant', num_thought_tokens=8" in text
    assert "8 tokens and 8 thoughts, 128 wide, in torch.float32" in text
    (answer,), written = served["shown"]
    assert written == answer["generated_text"]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_code(name: str) -> None:
    """If this fails after a change of a code cell: `make notebooks`."""
    execute = (FOLDER / "execute.py").read_text(encoding="utf-8")
    assert f'"{name}"' in execute
    notebook = read(name)
    names: dict[str, Any] = {}
    tree = ast.parse(execute)  # without its imports: only `make notebooks` needs nbclient
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "code_hash"]
    exec(compile(tree, "execute.py", "exec"), names | {"hashlib": __import__("hashlib"), "Any": Any}, names)
    assert notebook["metadata"]["softcot_peft"]["code"] == names["code_hash"](notebook)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert any(cell["outputs"] for cell in cells)
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_valid_small_and_name_no_machine(name: str) -> None:
    notebook, path = read(name), FOLDER / name
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[\w-]{1,64}", each) for each in ids)
    text = path.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert not re.search(r"/(?:home|root|tmp|Users|usr|opt)/", text)
    assert path.stat().st_size < 400_000
    assert not re.search(r"^\s*[%!]", "\n".join(code_of(notebook)), flags=re.MULTILINE)  # no magics
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", "\n".join("".join(cell["source"]) for cell in notebook["cells"]))
    assert [link for link in links if not (FOLDER / link).exists()] == []
    assert "change two names" in text


@pytest.mark.usefixtures("nothing_given")
def test_the_code_of_the_page_on_looking_runs(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/base").symlink_to(pair.base)
    (tmp_path / "path/to/assistant").symlink_to(pair.assistant)
    names: dict[str, Any] = {"__name__": "looking"}
    page = (ROOT / "docs/looking.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "looking.md", "exec"), names)
    named = re.findall(r"savefig\(\"([\w.]+)\"\)", page)
    assert len(named) == 7
    assert all(Path(name).stat().st_size for name in named)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_the_figures_of_the_page_are_made_by_code(tmp_path: Path) -> None:
    load_example("look").main(["--steps", "1", "--docs", str(tmp_path)])
    made = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert made == sorted(path.name for path in (ROOT / "docs/figures").glob("looking-*.png"))
    page = (ROOT / "docs/looking.md").read_text(encoding="utf-8")
    assert all(f"figures/{name}" in page for name in made)


_IMPORT = """
import sys, warnings
import datasets, peft, transformers  # whose progress bars warn in notebooks without ipywidgets
before = set(sys.modules)
warnings.simplefilter("error")
import softcot_peft, softcot_peft.analysis, softcot_peft.serving
from softcot_peft import compute_thoughts, prompt_embeds
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"IPython", "ipywidgets", "matplotlib", "tqdm"}))
"""


def test_the_package_brings_no_widgets_and_warns_of_nothing() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True, env=process_environment()
    )
    assert ran.stdout.splitlines()[-1] == "[]"


def test_progress_bars_of_the_examples_suit_terminals_and_notebooks() -> None:
    for path in EXAMPLES.rglob("*.py"):
        assert not re.search(r"^(?:from|import) tqdm\b(?!\.auto)", path.read_text(encoding="utf-8"), re.MULTILINE), (
            path
        )
