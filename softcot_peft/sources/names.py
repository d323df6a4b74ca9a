"""Hints for error messages about model names in configs: Hub ids, folders or registered names."""

from __future__ import annotations

import os

from ..checkpoint.local_names import PREFIX


def missing_folder(name: str) -> str:
    """Return where a relative name would be a folder; empty if the folder exists or the path is absolute.

    For a name that stands for a local folder in a shared adapter, return that nobody else has it.
    """
    if name.startswith(PREFIX):
        return "The author of the adapter had it in a local folder, which is not shared: ask for the model. "
    if os.path.isabs(name) or os.path.exists(name):
        return ""
    return (
        f"As a relative path, it refers to {os.path.abspath(name)!r}, which does not exist: run from the folder that "
        "it is relative to, or pass an absolute path. "
    )
