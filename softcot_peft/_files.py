"""Which files an adapter's folder or Hub repository holds. Reads none of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, file_exists, try_to_load_from_cache
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME


def has_pickle_alone(name: str, subfolder: str | None, options: Mapping[str, Any]) -> bool:
    """Whether an adapter's weights are a pickle, with no safetensors file beside it.

    Args:
        name: Hub id or folder of the adapter.
        subfolder: Folder within it.
        options: Of them `revision`, `cache_dir`, `token` and `local_files_only`, as `hf_hub_download` takes them.
    """
    folder = Path(name, subfolder or "")
    if folder.is_dir():
        return not (folder / SAFETENSORS_WEIGHTS_NAME).is_file() and (folder / WEIGHTS_NAME).is_file()
    where = {key: options[key] for key in ("revision", "repo_type") if options.get(key) is not None}
    offline = constants.HF_HUB_OFFLINE or bool(options.get("local_files_only"))

    def exists(file: str) -> bool:
        file = file if subfolder is None else f"{subfolder}/{file}"
        if isinstance(try_to_load_from_cache(name, file, cache_dir=options.get("cache_dir"), **where), str):
            return True
        return not offline and file_exists(name, file, token=options.get("token"), **where)

    return not exists(SAFETENSORS_WEIGHTS_NAME) and exists(WEIGHTS_NAME)


def pickled(where: str) -> str:
    """The message for an adapter that is a pickle."""
    return (
        f"An adapter must be a safetensors file, got a pickle in {where!r}, which can run code. If you trust it, "
        "load its tensors with `torch.load(..., weights_only=True)` and write them with "
        "`safetensors.torch.save_file` as adapter_model.safetensors."
    )
