"""Finished jobs, one JSON file each, so that an interrupted report can resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from blocks import write_whole


class Job(Protocol):
    """A dataclass whose fields describe what is done."""

    @property
    def name(self) -> str:
        """Name of the result, the beginning of its file's name."""


def fingerprint(files: Iterable[Path]) -> str:
    """Return a hash of twelve characters over the contents of the files and the versions of the libraries."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(" ".join(f"{name}={version(name)}" for name in ("torch", "transformers", "peft")).encode())
    return digest.hexdigest()[:12]


def changed(job: Any) -> dict[str, Any]:
    """Return the fields of a job that are not at their defaults, so that a new field does not rename old results."""
    values = {field.name: getattr(job, field.name) for field in fields(job)}
    defaults = {field.name: field.default for field in fields(job)}
    return {
        name: changed(value) if is_dataclass(value) else value
        for name, value in values.items()
        if value != defaults[name]
    }


class Store:
    """Results stored in a folder.

    Args:
        folder: Created if missing. It belongs to one state of the code; see `fingerprint`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, job: Job) -> Path:
        """Return the file of a job's result; jobs with different fields have different files."""
        described = json.dumps(changed(job), sort_keys=True)
        return self.folder / f"{job.name}.{hashlib.sha256(described.encode()).hexdigest()[:8]}.json"

    def __contains__(self, job: Job) -> bool:
        return self.path(job).exists()

    def __getitem__(self, job: Job) -> dict[str, Any]:
        return json.loads(self.path(job).read_text(encoding="utf-8"))["result"]

    def __setitem__(self, job: Job, result: dict[str, Any]) -> None:
        """Write atomically: the file is renamed when it is complete."""
        write_whole(self.path(job), json.dumps({"job": asdict(job), "result": result}))
