"""Runs the test suite in separate environments and writes the results to docs/support.md; see `make test-matrix`.

Needs only Python and pip. An environment that has passed does not run again until the code changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import venv
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from blocks import write_block  # noqa: E402  # after its folder is known

FOLDER = ROOT / ".venv-matrix"
NAMES = ("torch", "transformers", "peft", "trl", "lm-eval", "datasets")  # whose versions the table shows
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project]")[2]
VERSIONS = """
import importlib.metadata, json, platform, sys
found = {name: importlib.metadata.version(name).split("+")[0] for name in sys.argv[1:]}
print(json.dumps({"python": platform.python_version(), **found}))
"""


def floors() -> list[str]:
    """Constraints to the lowest version that pyproject.toml claims of everything but torch."""
    lowest = dict(re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)', PROJECT))
    return [f"{name}=={version}" for name, version in lowest.items() if name != "torch"]


def digest(*texts: str) -> str:
    """Changes with the code, the tests or any of the texts."""
    folders = ("softcot_peft", "tests", "examples", "benchmarks", "evaluation")
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    content = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(content + "\n".join((PROJECT, *texts)).encode()).hexdigest()


def install(python: Path, torch: str, constraints: list[str]) -> None:
    """Make an environment; torch first, so that pip looks for no other build of it."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    stamp, wanted = python.parents[1] / "installed", "\n".join([torch, *constraints, PROJECT])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    venv.create(python.parents[1], clear=True, with_pip=True)
    subprocess.run([*pip, torch], check=True)
    installed = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    builds = [line for line in installed.splitlines() if line.startswith("torch==")]
    listed = python.parents[1] / "constraints.txt"
    listed.write_text("\n".join([*constraints, *builds]), encoding="utf-8")
    subprocess.run([*pip, "--constraint", str(listed), "--editable", f"{ROOT}[test]"], check=True)
    stamp.write_text(wanted, encoding="utf-8")


def run(name: str, torch: str, constraints: list[str], jobs: str) -> dict[str, str]:
    """Run the suite in one environment, unless it has passed there; return its figures.

    Raises:
        subprocess.CalledProcessError: A test or an installation fails.
    """
    python = FOLDER / name / "bin" / "python"
    result, key = FOLDER / f"{name}.json", digest(torch, *constraints)
    if result.is_file():
        figures: dict[str, str] = json.loads(result.read_text(encoding="utf-8"))
        if figures["key"] == key:
            print(f"{name}: passed earlier")
            return figures
    install(python, torch, constraints)
    found = subprocess.run([python, "-c", VERSIONS, *NAMES], check=True, capture_output=True, text=True).stdout
    print(f"{name}: {found.strip()}", flush=True)
    report = FOLDER / f"{name}.xml"
    subprocess.run([python, "-m", "pytest", "-n", jobs, f"--junitxml={report}"], cwd=ROOT, check=True)
    suite = next(ElementTree.parse(report).iter("testsuite"))
    count = {field: int(suite.attrib[field]) for field in ("tests", "skipped")}
    figures = {
        "key": key,
        "versions": ", ".join(f"{package} {version}" for package, version in json.loads(found).items()),
        "passed": str(count["tests"] - count["skipped"]),
        "skipped": str(count["skipped"]),
        "seconds": f"{float(suite.attrib['time']):.0f}",
        "date": date.today().isoformat(),
    }
    result.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return figures


def main() -> None:
    """Run every environment, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", required=True, help="build of torch to install, such as torch==2.13.0")
    parser.add_argument("--torch-lowest", required=True, help="build of torch for the lowest versions")
    parser.add_argument("--jobs", default="2", help="number of pytest processes")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    environments = {
        "lowest": ("lowest supported", options.torch_lowest, floors()),
        "serving": ("pinned by serving engines", options.torch, ["transformers==5.19.*"]),
        "newest": ("newest", options.torch, []),
    }
    columns = ("versions", "passed", "skipped", "seconds", "date")
    rows = ["| environment | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, (title, torch, constraints) in environments.items():
        figures = run(name, torch, constraints, options.jobs)
        rows.append("| " + " | ".join([title, *(figures[column] for column in columns)]) + " |")
    write_block(ROOT / "docs" / "support.md", "matrix", "\n".join(rows))


if __name__ == "__main__":
    main()
