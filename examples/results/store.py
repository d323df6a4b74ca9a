"""What has been done already: one JSON file for each job, so that a report that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blocks import write_whole

from .jobs import Job


def fingerprint(files: Iterable[Path]) -> str:
    """Twelve characters that change with the content of any of the files, and with the libraries that compute."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(" ".join(f"{name}={version(name)}" for name in ("torch", "transformers", "peft")).encode())
    return digest.hexdigest()[:12]


class Store:
    """Results in a folder.

    Args:
        folder: Made if it is missing. It belongs to one state of the code: see `fingerprint`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, job: Job) -> Path:
        """The file of a job's result; another description is another file."""
        described = json.dumps(asdict(job), sort_keys=True)
        return self.folder / f"{job.name}.{hashlib.sha256(described.encode()).hexdigest()[:8]}.json"

    def __contains__(self, job: Job) -> bool:
        return self.path(job).exists()

    def __getitem__(self, job: Job) -> dict[str, Any]:
        return json.loads(self.path(job).read_text(encoding="utf-8"))["result"]

    def __setitem__(self, job: Job, result: dict[str, Any]) -> None:
        """Whole or not at all: the file gets its name when it is complete."""
        write_whole(self.path(job), json.dumps({"job": asdict(job), "result": result}))
