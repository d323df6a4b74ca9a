"""The project's files, and processes that import them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def process_environment() -> dict[str, str]:
    """The environment of a process that imports the package, and these helpers."""
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def load_example(name: str) -> Any:
    """A script of examples/, which is no package; one imports another by its name, as when it is run."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


def load_script(path: Path, name: str, known: bool = False) -> Any:
    """A module from a file, under a name of its own; `known`: whether others can import it under this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    if known:
        sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def rewrite(folder: Path, file: str = "adapter_config.json", **changes: object) -> str:
    """Change fields of a JSON file, by default of a saved adapter's config; returns the folder."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return str(folder)
