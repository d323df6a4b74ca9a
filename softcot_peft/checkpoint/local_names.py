"""Names of models in configs that are folders of one machine, and what stands for them in files that are shared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from peft.utils import CONFIG_NAME

NAME_FIELDS = ("base_model_name_or_path", "assistant_model_name_or_path", "tokenizer_name_or_path")
PREFIX = "local:"  # no Hub id contains a colon, so such a name is never looked up


def is_local(name: str | None) -> bool:
    """Return whether a name is a folder, or can only be a path.

    >>> is_local("/models/assistant"), is_local("owner/assistant"), is_local("C:/models/assistant")
    (True, False, True)
    """
    if not name or name.startswith(PREFIX):
        return False
    path = name.startswith((".", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/")
    return path or PurePath(name).is_absolute() or bool(PureWindowsPath(name).drive) or Path(name).is_dir()


def public_name(name: str) -> str:
    """Return what stands for a local folder in shared files: its last part, in a form that no Hub id has.

    >>> public_name("/models/assistant")
    'local:assistant'
    """
    return PREFIX + (PureWindowsPath(name).name if "\\" in name else Path(name).expanduser().resolve().name)


def is_given(config: Mapping[str, Any]) -> bool:
    """Return whether whoever loads an adapter must pass its assistant with `use_assistant`.

    Saving writes the commit of an assistant on the Hub, so that a name without owner and commit was registered.
    """
    name = config.get("assistant_model_name_or_path") or "/"
    return name.startswith(PREFIX) or not ("/" in name or config.get("assistant_revision") or is_local(name))


def read_adapter_config(folder: Path) -> dict[str, Any] | None:
    """Return the adapter config in a folder as it is stored; `None` if there is no SoftCoT adapter."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return None
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return stored if stored.get("peft_type") == "SOFTCOT" else None


def hide_local_names(folder: Path) -> dict[str, str]:
    """Replace the local folders in an adapter's config; returns them by field."""
    stored = read_adapter_config(folder) or {}
    local = {field: stored[field] for field in NAME_FIELDS if is_local(stored.get(field))}
    if local:
        stored |= {field: public_name(name) for field, name in local.items()}
        text = json.dumps(stored, indent=2, sort_keys=True)  # as PEFT writes it
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    return local


def local_names_message(local: Mapping[str, str], adapter_name: str) -> str:
    """Return the warning for local folders that an adapter's config named when it was prepared for the Hub."""
    lines = []
    for field, name in local.items():
        lines.append(
            f"`{field}` must be a Hub id in an adapter that is shared, got the local folder {name!r}, which nobody "
            f"else has. The shared files say {public_name(name)!r} instead. Push the model in the folder, set "
            f"`model.peft_config[{adapter_name!r}].{field} = 'owner/name'`, and push the adapter again."
        )
        if field == NAME_FIELDS[1]:
            lines.append(
                "Until then, whoever loads the adapter has to load the assistant first and call "
                f"`use_assistant(model, tokenizer, name={public_name(name)!r})`."
            )
    return " ".join(lines)


def given_name_message(name: str) -> str:
    """Return the warning for an assistant that was registered under a name that is no Hub id."""
    return (
        f"`assistant_model_name_or_path` must be a Hub id in an adapter that is shared, got {name!r}, a name given to "
        "`use_assistant`: whoever loads the adapter has to load the assistant first and call `use_assistant(model, "
        f"tokenizer, name={name!r})`. If the assistant is on the Hub, register it under its Hub id."
    )
