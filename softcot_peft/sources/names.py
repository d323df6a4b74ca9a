"""Names of models in configs: Hub ids, folders, or names of loaded ones."""

from __future__ import annotations

import os


def missing_folder(name: str) -> str:
    """Where a name would be a folder, for messages; empty where it is one, or an absolute path."""
    if os.path.isabs(name) or os.path.exists(name):
        return ""
    return (
        f"As a relative path, it stands for {os.path.abspath(name)!r} from here, which does not exist: start where it "
        "was given, or pass an absolute path. "
    )
