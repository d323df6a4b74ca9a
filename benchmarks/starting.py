"""Start-up cost: the import, in new processes, and the files read while loading an adapter."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from tqdm import trange
from transformers import AutoModelForCausalLM

import softcot_peft

from .models import config_of, make_pair, make_tokenizer
from .sizes import SIZES

# The import of the package is timed in a process that has just imported PEFT, because the difference between two
# processes that take seconds each would be smaller than their noise.
_IMPORTS = """
from time import perf_counter
start = perf_counter()
import peft
middle = perf_counter()
import softcot_peft
print(middle - start, perf_counter() - middle)
"""
_LONG_AGO = 1  # seconds since 1970
_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")


def import_seconds(processes: int) -> dict[str, list[float]]:
    """Measure the seconds of `import peft`, and of `import softcot_peft` after it, in new processes."""
    times: dict[str, list[float]] = {"import peft": [], "import softcot_peft": []}
    for _ in trange(-1, processes, desc="import", leave=False, unit="process"):
        for name, value in zip(times, _python("-c", _IMPORTS).stdout.split(), strict=True):
            times[name].append(float(value))
    return {name: found[1:] for name, found in times.items()}  # the first process may have compiled bytecode


def slowest_imports(number: int = 5) -> dict[str, float]:
    """Return the modules that the package imports after PEFT and their own seconds, slowest first."""
    report = _python("-X", "importtime", "-c", "import peft, softcot_peft").stderr
    found = [(match[2], int(match[1]) / 1e6) for match in _LINE.finditer(report)]  # in import order
    after = found[[name for name, _ in found].index("peft") + 1 :]
    return dict(sorted(after, key=lambda item: -item[1])[:number])


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(softcot_peft.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, env=environment)  # noqa: S603


def files_read() -> dict[str, dict[str, list[str]]] | None:
    """Record which files of an adapter and its assistant are read on loading and on first use.

    Uses the files' access times, with models of a few kilobytes, because file names do not depend on sizes.

    Returns:
        For "loading" and "first use", the names of the files read in the folders "adapter" and "assistant"; `None` if
        the file system does not record access times.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _save_pair(root)
        gc.collect()  # adapters share an assistant while one of them exists
        if not _keeps_times(root / "adapter" / "README.md"):
            return None
        base, found = AutoModelForCausalLM.from_pretrained(root / "base"), {}
        _forget(root)
        model = PeftModel.from_pretrained(base, str(root / "adapter")).eval()
        found["loading"] = _accessed(root)
        _forget(root)
        with torch.no_grad():
            model(input_ids=torch.tensor([[3, 4, 5]]), logits_to_keep=1)
        found["first use"] = _accessed(root)
    return found


def _save_pair(root: Path) -> None:
    """Save a tiny base, its assistant, and an adapter with the files of a trainer."""
    pair = make_pair(SIZES["smoke"], "cpu")
    pair.base.save_pretrained(root / "base")
    pair.assistant.save_pretrained(root / "assistant")
    make_tokenizer(pair.assistant.config.vocab_size).save_pretrained(root / "assistant")
    get_peft_model(pair.base, config_of(str(root / "assistant"), 3)).save_pretrained(str(root / "adapter"))
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin"):
        (root / "adapter" / name).write_bytes(bytes(1000))


def _keeps_times(file: Path) -> bool:
    _forget(file.parent)
    file.read_bytes()
    return file.stat().st_atime > _LONG_AGO


def _forget(folder: Path) -> None:
    """Reset all access times to the distant past; `relatime` mounts update such times on the next read."""
    for file in folder.rglob("*"):
        os.utime(file, (_LONG_AGO, file.stat().st_mtime))


def _accessed(root: Path) -> dict[str, list[str]]:
    return {
        name: sorted(file.name for file in (root / name).iterdir() if file.stat().st_atime > _LONG_AGO)
        for name in ("adapter", "assistant")
    }
