"""Checks untrusted files before anything is built from them: names, counts and types. Never runs code.

An adapter names an assistant, and anybody can publish either. SECURITY.md describes what follows from that.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import constants, file_exists, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

# Limits for counts in configs, by the end of the field name: several times those of the largest published LM.
_COUNT_LIMITS = {re.compile(r"(^|_)(layers?|blocks?)$"): 1024, re.compile(r"(^|_)(experts|heads?)$"): 4096}
_MOST_PARAMETERS = 100_000  # tensors per model


def read_config(name: str, revision: str | None) -> PretrainedConfig:
    """Read a model's config without running code, and reject implausible values before a model is built.

    Raises:
        OSError: No config exists under this name.
        ValueError: The config is invalid, or does not describe a plausible model.
    """
    found, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    _check_config(found)
    return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def _check_config(config: Mapping[str, Any], code: bool = False) -> None:
    for key, value in config.items():
        names_code = code or str(key).endswith("_implementation")
        if isinstance(value, Mapping):
            _check_config(value, names_code)
        # For a name like "owner/kernel", transformers downloads compiled code from the Hub and runs it (5.23).
        elif names_code and isinstance(value, str) and not value.isidentifier():
            raise ValueError(f"its config asks for the code of {value!r} as `{key}`, which never runs.")
        for count, most in _COUNT_LIMITS.items():
            if count.search(str(key)) and isinstance(value, (int, float)) and value > most:
                raise ValueError(f"its config says `{key}` is {value}, and no LM has more than {most}.")


def check_shards(name: str, revision: str | None) -> None:
    """Reject an index of weight files that points outside the model's folder."""
    try:
        index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, revision=revision)
    except OSError:
        return  # not sharded
    if index is None:
        return
    files = json.loads(Path(index).read_text(encoding="utf-8")).get("weight_map", {}).values()
    paths = {file: PureWindowsPath(file) for file in files}  # knows drives and both separators on every platform
    outside = [file for file, path in paths.items() if path.anchor or ".." in path.parts]
    if outside:
        raise ValueError(f"its list of weight files leads out of its folder, to {outside[0]!r}.")


@contextmanager
def meta_model() -> Iterator[None]:
    """Build models on the meta device, and reject models with an implausible number of tensors."""
    count, thread = 0, threading.get_ident()

    def register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > _MOST_PARAMETERS:
            raise ValueError(f"its config asks for more than {_MOST_PARAMETERS} tensors.")

    handle = register_module_parameter_registration_hook(register)
    try:
        with torch.device("meta"):
            yield
    finally:
        handle.remove()


def has_only_pickle(name: str, subfolder: str | None, options: Mapping[str, Any]) -> bool:
    """Return whether an adapter's weights are a pickle, without a safetensors file next to it."""
    folder = Path(name, subfolder or "")
    if folder.is_dir():
        return not (folder / SAFETENSORS_WEIGHTS_NAME).is_file() and (folder / WEIGHTS_NAME).is_file()
    where = {key: options[key] for key in ("revision", "repo_type") if options.get(key) is not None}
    offline = constants.HF_HUB_OFFLINE or bool(options.get("local_files_only"))

    def exists(file: str) -> bool:
        file = file if subfolder is None else f"{subfolder}/{file}"
        if isinstance(try_to_load_from_cache(name, file, cache_dir=options.get("cache_dir"), **where), str):
            return True
        return not offline and _exists_on_hub(name, file, token=options.get("token"), **where)

    return not exists(SAFETENSORS_WEIGHTS_NAME) and exists(WEIGHTS_NAME)


def _exists_on_hub(name: str, file: str, **options: Any) -> bool:
    """Return whether a repository has a file. Asks again if the Hub is busy, which `file_exists` does not."""
    for wait in (1, 2, 4):
        try:
            return file_exists(name, file, **options)
        except HfHubHTTPError as error:
            if error.response.status_code not in (429, 500, 502, 503, 504):
                raise
            time.sleep(wait)
    return file_exists(name, file, **options)


def pickle_message(where: str) -> str:
    """Return the error message for an adapter that is a pickle."""
    return (
        f"An adapter must be a safetensors file, got a pickle in {where!r}, which can run code. If you trust it, "
        "load its tensors with `torch.load(..., weights_only=True)` and write them with "
        "`safetensors.torch.save_file` as adapter_model.safetensors."
    )
