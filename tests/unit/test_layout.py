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
PUBLIC = {"softcot_peft"}  # modules that tests may import from anywhere
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
            found += [node.module] if node.module not in PUBLIC else names if node.module == "softcot_peft" else []
        elif isinstance(node, ast.Attribute) and node.attr.startswith("softcot_"):
            found.append(node.attr)
        elif isinstance(node, ast.Constant) and re.match(r"softcot_peft\.\w+\.", str(node.value)):
            found.append(str(node.value))
    return [name for name in found if name not in PUBLIC]


def test_only_helpers_reaches_into_the_package() -> None:
    found = {path.relative_to(TESTS).as_posix(): internals(path) for path in FILES}
    assert {name: names for name, names in found.items() if names} == {}
