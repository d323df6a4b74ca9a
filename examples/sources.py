"""Checks the sources of models given on the command line."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def check_source(option: str, name: str) -> None:
    """Reject a name that is neither a folder nor a valid Hub id. The Hub's own error does not mention folders.

    Args:
        option: Option of the command line.
        name: Value of the option.

    Raises:
        ValueError: If `name` is neither a folder nor a valid Hub id.
    """
    if Path(name).is_dir():
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"`{option}` must be a folder or a Hub id such as 'owner/name', got {name!r}, which is not an existing "
            "folder."
        ) from error
