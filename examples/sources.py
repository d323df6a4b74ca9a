"""Where the models of a command line come from."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def check_source(option: str, name: str) -> None:
    """Refuse what is no folder and cannot be on the Hub, of which the Hub's library says nothing about folders.

    Args:
        option: Of the command line.
        name: What was given.

    Raises:
        ValueError: It says which option, what it must be, and what was found.
    """
    if Path(name).is_dir():
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"`{option}` must be a folder or a Hub id such as 'owner/name', got {name!r}, which is no folder here."
        ) from error
