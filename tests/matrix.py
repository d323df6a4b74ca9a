"""Runs the test suite in separate environments and writes the results to docs/support.md; see `make test-matrix`.

Needs only Python and pip. An environment that has passed does not run again until the code changes. With some of the
environments or of the tests, the results are printed only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from blocks import write_block  # noqa: E402  # after its folder is known

FOLDER = ROOT / ".venv-matrix"
ENVIRONMENTS = ("lowest", "serving", "newest")
NAMES = ("torch", "transformers", "peft", "trl", "lm-eval", "datasets")  # whose versions the table shows
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project]")[2]
PIP = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
VERSIONS = """
import importlib.metadata, json, platform, sys
installed = {name.metadata["Name"].lower().replace("_", "-") for name in importlib.metadata.distributions()}
found = {name: importlib.metadata.version(name).split("+")[0] for name in sys.argv[1:] if name in installed}
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


def python_of(folder: Path) -> Path:
    """Return the Python of a virtual environment."""
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def install(
    folder: Path, torch: str, constraints: list[str], project: list[str], python: str = sys.executable
) -> None:
    """Make an environment, unless it is there already; torch first, so that pip looks for no other build of it.

    Args:
        folder: The environment's folder; what is in it is deleted.
        torch: The build of torch, as a requirement.
        constraints: Versions of other packages.
        project: Arguments of `pip install` that name the project.
        python: The Python to make the environment with.
    """
    stamp, wanted = folder / "installed", "\n".join([python, torch, *constraints, *project, PROJECT])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    own = python_of(folder)
    subprocess.run([own, *PIP, torch], check=True)
    installed = subprocess.run([own, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    builds = [line for line in installed.splitlines() if line.startswith("torch==")]
    listed = folder / "constraints.txt"
    listed.write_text("\n".join([*constraints, *builds]), encoding="utf-8")
    subprocess.run([own, *PIP, "--constraint", listed, *project], check=True)
    stamp.write_text(wanted, encoding="utf-8")


def versions(folder: Path, names: tuple[str, ...] = NAMES) -> dict[str, str]:
    """Return the versions of Python and of packages in an environment."""
    command = [python_of(folder), "-c", VERSIONS, *names]
    found: dict[str, str] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def run(name: str, torch: str, constraints: list[str], options: argparse.Namespace, python: str) -> dict[str, str]:
    """Run the suite in one environment, unless it has passed there; return its figures.

    Raises:
        subprocess.CalledProcessError: A test or an installation fails.
    """
    folder, result = FOLDER / name, FOLDER / f"{name}.json"
    key = digest(python, torch, *constraints, *options.tests)
    if result.is_file():
        figures: dict[str, str] = json.loads(result.read_text(encoding="utf-8"))
        if figures["key"] == key:
            print(f"{name}: passed earlier")
            return figures
    install(folder, torch, constraints, ["--editable", f"{ROOT}[test]"], python)
    found = versions(folder)
    print(f"{name}: {found}", flush=True)
    report = FOLDER / f"{name}.xml"
    command = [python_of(folder), "-m", "pytest", "-n", options.jobs, f"--junitxml={report}", *options.tests]
    subprocess.run(command, cwd=ROOT, check=True)
    suite = next(ElementTree.parse(report).iter("testsuite"))
    count = {field: int(suite.attrib[field]) for field in ("tests", "skipped")}
    figures = {
        "key": key,
        "versions": ", ".join(f"{package} {version}" for package, version in found.items()),
        "passed": str(count["tests"] - count["skipped"]),
        "skipped": str(count["skipped"]),
        "seconds": f"{float(suite.attrib['time']):.0f}",
        "date": date.today().isoformat(),
    }
    result.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return figures


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", required=True, help="build of torch to install, such as torch==2.13.0")
    parser.add_argument("--torch-lowest", required=True, help="build of torch for the lowest versions")
    parser.add_argument("--jobs", default="2", help="number of pytest processes")
    parser.add_argument("--pythons", nargs="+", default=[sys.executable], help="Pythons to run every environment with")
    parser.add_argument("--environments", nargs="+", choices=ENVIRONMENTS, default=ENVIRONMENTS, help="which to run")
    parser.add_argument("--tests", nargs="+", default=[], help="folders or files of tests to run; default: all")
    return parser.parse_args()


def main() -> None:
    """Run the environments, then write the table, or print it if only a part has run."""
    options = read_options()
    FOLDER.mkdir(exist_ok=True)
    environments = {
        "lowest": ("lowest supported", options.torch_lowest, floors()),
        "serving": ("pinned by serving engines", options.torch, ["transformers==5.19.*"]),
        "newest": ("newest", options.torch, []),
    }
    columns = ("versions", "passed", "skipped", "seconds", "date")
    rows = ["| environment | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for python in options.pythons:
        suffix = "" if python == sys.executable else "-" + re.sub(r"\W+", "-", python).strip("-")
        for name in options.environments:
            title, torch, constraints = environments[name]
            figures = run(name + suffix, torch, constraints, options, python)
            rows.append("| " + " | ".join([title, *(figures[column] for column in columns)]) + " |")
    if options.tests or list(options.environments) != list(ENVIRONMENTS):
        print("\n".join(rows))
    else:
        write_block(ROOT / "docs" / "support.md", "matrix", "\n".join(rows))


if __name__ == "__main__":
    main()
