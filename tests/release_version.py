"""Sets the version (`--set 0.3.0.dev0`), or checks that all places agree, for a release with its tag (`--tag v0.2.0`).

The version is in softcot_peft/_version.py, from where the build and the package read it. CITATION.cff repeats it, and
CHANGELOG.md has a section for it. Needs only Python.
"""

from __future__ import annotations

import argparse
import re
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = r"(\d+\.\d+\.\d+)(\.dev\d+)?"
SOURCE = (ROOT / "softcot_peft" / "_version.py", re.compile(rf'^__version__ = "({VERSION})"$', re.M))
CITATION = (ROOT / "CITATION.cff", re.compile(rf"^version: ({VERSION})$", re.M))
CHANGELOG = (ROOT / "CHANGELOG.md", re.compile(r"^## (\d+\.\d+\.\d+)(?: \((unreleased|\d{4}-\d\d-\d\d)\))?$", re.M))
REPOSITORY = re.compile(r'^Repository = "(.+)"$', re.M)
ELSEWHERE = {"CITATION.cff": r"^repository-code: (.+)$", "mkdocs.yml": r"^repo_url: (.+)$"}
RELEASED = re.compile(r"^date-released: (.+)\n", re.M)


def found_in(place: tuple[Path, re.Pattern[str]]) -> re.Match[str]:
    """Return the first version in a file.

    Raises:
        ValueError: There is none.
    """
    path, pattern = place
    found = pattern.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{path.name} must have a line such as {pattern.pattern!r}, but has none.")
    return found


def version() -> str:
    """Return the version, without importing the package."""
    return found_in(SOURCE)[1]


def check_address() -> None:
    """Check that files that repeat the repository's address have the one in pyproject.toml, or none if it has none.

    Raises:
        ValueError: A file has another one.
    """
    address = REPOSITORY.search((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for name, pattern in ELSEWHERE.items():
        path = ROOT / name
        found = re.search(pattern, path.read_text(encoding="utf-8"), re.M) if path.exists() else address
        if (address and address[1]) != (found and found[1].strip("\"'")):
            raise ValueError(
                f"{name} must have the address of `Repository` in pyproject.toml, or none if that is none."
            )


def check(tag: str | None = None) -> None:
    """Check that version, citation, changelog, the repository's address and, for a release, its tag agree.

    Raises:
        ValueError: They do not; the message names the place.
    """
    now, (_, release, dev) = version(), found_in(SOURCE).groups()
    if found_in(CITATION)[1] != now:
        raise ValueError(f"CITATION.cff must have the version {now}, got {found_in(CITATION)[1]}.")
    section, state = found_in(CHANGELOG).groups()
    if section != release:
        raise ValueError(f"The first section of CHANGELOG.md must be {release}, got {section}.")
    check_address()
    if tag is None:
        return
    if dev or tag != f"v{now}":
        raise ValueError(f"The tag of a release must be v and the version, which is {now}, got {tag}.")
    dated = RELEASED.search(CITATION[0].read_text(encoding="utf-8"))
    if state in (None, "unreleased") or dated is None or dated[1] != state:
        raise ValueError(
            "CHANGELOG.md and CITATION.cff must have the date of the release; set the version with --set."
        )


def replace(path: Path, pattern: re.Pattern[str], text: str) -> None:
    """Replace the first match in a file."""
    content = pattern.sub(lambda _: text, path.read_text(encoding="utf-8"), count=1)
    path.write_text(content, encoding="utf-8", newline="\n")


def write(wanted: str, today: date) -> None:
    """Set the version in all places, and the date of a release.

    Raises:
        ValueError: The version is neither `1.2.3` nor `1.2.3.dev0`, or lower than that of the changelog.
    """
    parts = re.fullmatch(VERSION, wanted)
    if parts is None:
        raise ValueError(f"The version must be like 1.2.3 or 1.2.3.dev0, got {wanted}.")
    release, dev = parts.groups()
    heading = found_in(CHANGELOG)
    if [int(number) for number in release.split(".")] < [int(number) for number in heading[1].split(".")]:
        raise ValueError(
            f"The version must not be lower than {heading[1]}, the changelog's first section, got {wanted}."
        )
    replace(*SOURCE, f'__version__ = "{wanted}"')
    replace(CITATION[0], RELEASED, "")
    replace(*CITATION, f"version: {wanted}" + ("" if dev else f"\ndate-released: {today.isoformat()}"))
    state = "unreleased" if dev else today.isoformat()
    old = "" if heading[1] == release else f"\n\n{heading[0]}"
    replace(*CHANGELOG, f"## {release} ({state}){old}")


def main() -> None:
    """Set the version if asked to, then check."""
    parser = argparse.ArgumentParser(description=__doc__)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--set", help="the new version, such as 0.2.0 or 0.3.0.dev0")
    action.add_argument("--tag", help="the tag of a release, such as v0.2.0")
    options = parser.parse_args()
    if options.set:
        write(options.set, date.today())
    check(options.tag)
    print(version())


if __name__ == "__main__":
    main()
