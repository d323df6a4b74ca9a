"""Saves an adapter so that its folder holds the old one or the new one, at whatever moment the process is killed.

PEFT writes the weights, then the config; transformers' `save_pretrained` of a base with an injected adapter does it
the other way round. Here both are first written whole into a folder beside them, and then moved into place.

Each move is atomic, two together are not. Where old and new config differ, `adapter_config.json` says for that moment
that a save is going on; loading then is an error that says how to finish it, and the next save does so by itself.
Knows nothing about models.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import peft.peft_model
import transformers.modeling_utils
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

STAGED = ".softcot-staged"
_WEIGHT = "softcot_projection"
_VERSIONS = ("peft_version", "softcot_peft_version")  # fields without which two configs are still the same adapter's
_MARK = "interrupted_save"  # in a config: weights and config are being replaced

# The folder whose weights are staged while the config is still to come (PEFT's order).
_EXPECTED: ContextVar[Path | None] = ContextVar("softcot_expected", default=None)
# Whether the config is saved first and the weights are still to come (transformers' order).
_CONFIG_FIRST: ContextVar[bool] = ContextVar("softcot_config_first", default=False)


def install() -> None:
    """Have PEFT and transformers stage the weights of SoftCoT adapters; does nothing where they do.

    Neither has a hook around writing the weights (peft 0.21, transformers 5.23); both call the global name
    `safe_save_file` of their module, from `PeftModel.save_pretrained` and `PreTrainedModel.save_pretrained`.
    Everything but an adapter file with a SoftCoT projection goes straight through.
    """
    modules: tuple[Any, ...] = (peft.peft_model, transformers.modeling_utils)
    for module in modules:
        original = module.safe_save_file
        if not (isinstance(original, functools.partial) and original.func is _save_weights):
            module.safe_save_file = functools.partial(_save_weights, original)


def save_config(folder: str, write: Callable[[Path], None]) -> None:
    """Stage the config of an adapter, and put it into place together with the weights that are saved with it.

    Args:
        folder: The adapter's folder; made if needed.
        write: Writes the config, and what belongs beside it, into the folder it is given.
    """
    target = Path(folder)
    expected = _EXPECTED.get() == target.absolute()
    _EXPECTED.set(None)
    with _staging(target, keep=expected) as staged:
        write(staged)
    if not _CONFIG_FIRST.get():
        _commit(target)


def save_base(original: Callable[..., Any], save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` of a base with an injected adapter: config and weights come into place together.

    Args:
        original: The base's own method.
        save_directory: The adapter's folder.
        *args: As it takes them.
        **kwargs: As it takes them.
    """
    token = _CONFIG_FIRST.set(True)
    try:
        result = original(save_directory, *args, **kwargs)
    except BaseException:
        _discard(Path(save_directory))
        raise
    finally:
        _CONFIG_FIRST.reset(token)
    if (Path(save_directory) / STAGED).is_dir():  # no weights came: sharded, or written by another process
        _commit(Path(save_directory))
    return result


def _save_weights(original: Callable[..., None], tensors: dict[str, Tensor], filename: Any, **kwargs: Any) -> None:
    """Stage an adapter's weights; put them into place if the config is staged already."""
    path = Path(filename)
    if path.name != SAFETENSORS_WEIGHTS_NAME or not any(_WEIGHT in key for key in tensors):
        return original(tensors, filename, **kwargs)
    with _staging(path.parent, keep=_CONFIG_FIRST.get()) as staged:
        original(tensors, staged / path.name, **kwargs)
    if _CONFIG_FIRST.get():
        _commit(path.parent)
    else:
        _EXPECTED.set(path.parent.absolute())
    return None


@contextmanager
def _staging(folder: Path, keep: bool) -> Iterator[Path]:
    """The folder beside an adapter's files to write new ones into; gone again when writing fails.

    Args:
        folder: The adapter's folder.
        keep: Whether it holds another file of the same save.
    """
    staged = folder / STAGED
    if not keep:
        if (staged / CONFIG_NAME).exists() and _is_marked(folder):
            _commit(folder)  # a killed save had everything written
        _discard(folder)
    try:
        staged.mkdir(parents=True, exist_ok=True)
        yield staged
    except BaseException:
        _discard(folder)
        raise


def _commit(folder: Path) -> None:
    """Move the staged files into place."""
    staged, weights, config = folder / STAGED, SAFETENSORS_WEIGHTS_NAME, folder / CONFIG_NAME
    for path in staged.iterdir():
        if path.name not in (weights, CONFIG_NAME):
            os.replace(path, folder / path.name)
    if (staged / weights).exists():
        new = _read(staged / CONFIG_NAME)
        if config.exists() and _identity(new) != _identity(_read(config)):
            mark = staged / "mark.json"
            mark.write_text(json.dumps(new | {_MARK: True}), encoding="utf-8")
            _replace(mark, config)
        _replace(staged / weights, folder / weights)
    _replace(staged / CONFIG_NAME, config)  # last: it makes a folder an adapter's
    _discard(folder)


def _replace(path: Path, target: Path) -> None:
    """Move a file over another, in an order that holds on the disk too."""
    _sync(path)
    os.replace(path, target)
    _sync(target.parent)


def _discard(folder: Path) -> None:
    """Remove the staged files, unless they are what a save still needs to be finished."""
    if not _is_marked(folder):
        shutil.rmtree(folder / STAGED, ignore_errors=True)


def _is_marked(folder: Path) -> bool:
    """Whether a save was killed between weights and config."""
    return _MARK in _read(folder / CONFIG_NAME)


def _read(path: Path) -> dict[str, Any]:
    """The values of a JSON file; empty where there are none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what may differ between two saves of one adapter."""
    return {name: value for name, value in config.items() if name not in _VERSIONS}


def _sync(path: Path) -> None:
    """Have a file or folder reach the disk, so that a power cut meets the same order of events as a kill."""
    if os.name != "posix" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
