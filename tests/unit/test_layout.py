"""The tests' own page names files that exist, and one file alone reaches into the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from project_files import ROOT

import softcot_peft

TESTS = ROOT / "tests"
PAGE = (TESTS / "README.md").read_text(encoding="utf-8")
LINES = dict(re.findall(r"^\| (\d) \| .* \| ([^|]+) \|$", PAGE, flags=re.MULTILINE))
PUBLIC = {
    "softcot_peft",
    "softcot_peft.analysis",
    "softcot_peft.convert",
    "softcot_peft.live_rows",
    "softcot_peft.serving",
    "softcot_peft.sources",
}  # modules that tests may import from anywhere
FILES = sorted(path for path in TESTS.rglob("*.py") if path.name not in ("helpers.py", "test_layout.py"))


def test_every_file_that_the_page_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/.]*)`", PAGE)
    assert len(named) > 40
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_line_of_the_contract_is_proved_and_every_proof_is_named() -> None:
    assert set(LINES) == set("123456789")
    proofs = {path.relative_to(ROOT).as_posix() for path in (TESTS / "contract").glob("test_*.py")}
    assert all(proofs & set(re.findall(r"`([^`]+)`", files)) for files in LINES.values())
    assert [name for name in sorted(proofs) if f"`{name}`" not in PAGE] == []


def internals(path: Path) -> list[str]:
    """What a file takes from the package besides its public names."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.startswith("softcot_peft.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "softcot_peft":
            names = [name.name for name in node.names if name.name not in (*softcot_peft.__all__, "__version__")]
            names = [name for name in names if f"softcot_peft.{name}" not in PUBLIC]
            found += [node.module] if node.module not in PUBLIC else names if node.module == "softcot_peft" else []
        elif isinstance(node, ast.Attribute) and node.attr.startswith("softcot_"):
            found.append(node.attr)
        elif isinstance(node, ast.Constant) and re.match(r"softcot_peft\.\w+\.", str(node.value)):
            found.append(str(node.value))
    return [name for name in found if name not in PUBLIC]


def test_only_helpers_reaches_into_the_package() -> None:
    found = {path.relative_to(TESTS).as_posix(): internals(path) for path in FILES}
    assert {name: names for name, names in found.items() if names} == {}


# The package


ORDER = (  # imports point from later ones to earlier ones
    "_version", "running", "compat", "rows", "checkpoint", "registration", "config_checks", "config", "sources",
    "embedding", "passes", "guards", "publishing", "check_base", "hooks", "attached", "loading", "tuner", "precompute",
    "analysis", "convert", "live_rows", "chat_template", "conversations", "serving",
    "__init__",
)  # fmt: skip
PACKAGE = ROOT / "softcot_peft"


def imported(path: Path) -> set[str]:
    """The modules of the package that one of its modules imports, as dotted names."""
    package = path.parent.relative_to(PACKAGE).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            module = [*above, *(node.module or "").split(".")]
            found |= (
                {".".join([*filter(None, module)])}
                if node.module
                else {".".join([*above, n.name]) for n in node.names}
            )
    return found


def test_imports_point_one_way() -> None:
    modules = {path: imported(path) for path in PACKAGE.rglob("*.py")}
    for path, names in modules.items():
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        later = {name for name in names if ORDER.index(name.split(".")[0]) > ORDER.index(own)}
        assert not later, f"{path.name} imports {later}"
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in modules} == set(ORDER)
    graph = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): names
        for path, names in modules.items()
    }
    done: set[str] = set()
    while graph.keys() - done:  # take away what imports nothing that is left
        free = {name for name in graph.keys() - done if graph[name].intersection(graph) - {name} <= done}
        assert free, f"a circle of imports among {sorted(graph.keys() - done)}"
        done |= free


def lines_of(node: ast.FunctionDef, lines: list[str]) -> int:
    """Lines of code of a function, without its docstring, comments and empty lines."""
    has_docstring = ast.get_docstring(node) is not None
    start = node.body[0].end_lineno if has_docstring else node.lineno
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines[start : node.end_lineno])


def test_no_module_has_more_than_250_lines_and_no_function_more_than_40() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        lines = text.split("\n")
        assert len(lines) <= 251, f"{path.name} has {len(lines) - 1} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert lines_of(node, lines) <= 40, f"{path.name}: {node.name}"
