"""Builds the wheel and the sdist, checks them, and uses the wheel in two new environments; see `make release-check`.

Needs only Python and pip. What may be uploaded is in `.venv-release/dist` if the script ends without an error.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

from matrix import PIP, PROJECT, ROOT, floors, install, python_of, versions
from release_version import version

FOLDER = ROOT / ".venv-release"
TOOLS = ["build==1.6.1", "twine==7.0.0"]
SCRIPT = ROOT / "tests" / "use_release.py"
EXTRAS = set(
    re.findall(r"^([\w-]+) = \[", PROJECT.partition("[project.optional-dependencies]")[2].partition("\n\n")[0], re.M)
)


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it, and check their metadata; return the wheel and the sdist."""
    tools, dist = folder / "tools", folder / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    if not python_of(tools).exists():
        subprocess.run([sys.executable, "-m", "venv", tools], check=True)
    subprocess.run([python_of(tools), *PIP, *TOOLS], check=True)
    subprocess.run([python_of(tools), "-m", "build", "--outdir", dist, ROOT], check=True, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    subprocess.run([python_of(tools), "-m", "twine", "check", "--strict", wheel, sdist], check=True)
    return wheel, sdist


def package_files() -> set[str]:
    """The files of the package in the checkout, as a wheel names them."""
    found = [path for path in (ROOT / "softcot_peft").rglob("*") if path.suffix == ".py" or path.name == "py.typed"]
    return {path.relative_to(ROOT).as_posix() for path in found}


def check_wheel(wheel: Path) -> None:
    """Check that a wheel has the package's files, its metadata and the licence, and nothing else.

    Raises:
        ValueError: It has other files, or metadata that disagree with pyproject.toml.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        fields = message_from_bytes(archive.read(metadata))
    info = metadata.partition("/")[0]
    known = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")}
    expected = package_files() | known | {f"{info}/licenses/LICENSE"}
    if names != expected:
        raise ValueError(f"{wheel.name} must have the package's files, but differs in {sorted(names ^ expected)}.")
    if set(fields.get_all("Provides-Extra", [])) != EXTRAS:
        raise ValueError(
            f"{wheel.name} must have the extras {sorted(EXTRAS)}, got {fields.get_all('Provides-Extra')}."
        )
    if fields["Version"] != version() or f"-{version()}-" not in wheel.name:
        raise ValueError(f"{wheel.name} must have the version {version()}, got {fields['Version']}.")


def check_sdist(sdist: Path) -> None:
    """Check that an sdist has the package and what its metadata name, and no tests.

    Raises:
        ValueError: A file is missing, or tests are in it.
    """
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "setup.cfg", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"}
    missing = (package_files() | wanted) - names
    extra = {name for name in names if name.startswith(("tests", "examples", ".github"))}
    if missing or extra:
        raise ValueError(f"{sdist.name} lacks {sorted(missing)} and must not have {sorted(extra)}.")


def use(name: str, wheel: Path, torch: str, constraints: list[str]) -> None:
    """Install a wheel in a new environment, and train, save, load and generate with it, away from the checkout."""
    environment = FOLDER / name
    (environment / "installed").unlink(missing_ok=True)
    install(environment, torch, constraints, [str(wheel)])
    print(f"{name}: {versions(environment, ('torch', 'transformers', 'peft'))}", flush=True)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as scratch:
        script = shutil.copy(SCRIPT, scratch)
        command = [python_of(environment), "-I", "-W", "error::DeprecationWarning:softcot_peft", script, version()]
        subprocess.run(command, check=True, cwd=scratch, env=variables | {"HF_HUB_OFFLINE": "1"})


def main() -> None:
    """Build, check, and use the wheel with the lowest and the newest versions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", required=True, help="build of torch to install, such as torch==2.13.0")
    parser.add_argument("--torch-lowest", required=True, help="build of torch for the lowest versions")
    parser.add_argument("--only-build", action="store_true", help="build and check, but do not install")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    wheel, sdist = build(FOLDER)
    check_wheel(wheel)
    check_sdist(sdist)
    if not options.only_build:
        use("lowest", wheel, options.torch_lowest, floors())
        use("newest", wheel, options.torch, [])
    print(f"{wheel.name} and {sdist.name} in {wheel.parent.relative_to(ROOT).as_posix()} may be uploaded.")


if __name__ == "__main__":
    main()
