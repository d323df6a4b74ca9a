"""Prepares an adapter's files for the Hub: a complete model card, and no path of this machine."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from .card import hide_local_base, is_training_draft, keep_training_draft, write_card
from .local_names import given_name_message, hide_local_names, is_given, local_names_message, read_adapter_config


def prepare_for_hub(folder: str | os.PathLike[str], repo_id: str | None = None) -> None:
    """Complete the model card of a saved adapter, and take local folders out of its config.

    `push_to_hub` does this with the copy that it uploads. Call it before you upload a folder in another way, such as
    `hf upload`, or after a trainer of TRL has written its model card. Local names of base, assistant and tokenizer
    become `"local:NAME"`, so the folder then loads only with models that you pass.

    Args:
        folder: Folder of the adapter, or of several, each in its own subfolder.
        repo_id: Repository that the code in the card loads from. `None`: the card leaves its place open.

    Raises:
        ValueError: The folder has no SoftCoT adapter.

    Warns:
        UserWarning: The config named local folders; the message says what to set.

    Example:
        ```python
        from softcot_peft import SoftCoTConfig, prepare_for_hub

        names = {"base_model_name_or_path": "owner/base", "assistant_model_name_or_path": "owner/assistant"}
        SoftCoTConfig(**names, task_type="CAUSAL_LM").save_pretrained("my-adapter")  # with the model, usually
        prepare_for_hub("my-adapter", repo_id="me/my-adapter")
        ```
    """
    for message in _prepare(Path(folder), repo_id):
        warnings.warn(message, stacklevel=2)


def prepare_copy(folder: str, repo_id: str) -> None:
    """Prepare the copy of a folder that `push_to_hub` uploads; does nothing if there is no SoftCoT adapter."""
    if _adapters(Path(folder)):
        for message in _prepare(Path(folder), repo_id):
            warnings.warn(message, stacklevel=4)


def complete_after_trainer(folder: str | os.PathLike[str]) -> None:
    """Put the text of a saved adapter's card back after `Trainer.create_model_card` has replaced the card.

    Does nothing for cards that the Trainer has not just written. `Trainer.push_to_hub` uploads the folder next, so
    local folders leave its config.
    """
    root = Path(folder)
    if not _adapters(root) or not is_training_draft(root):
        return
    if read_adapter_config(root) is not None:
        keep_training_draft(root)
    for message in _prepare(root, None):
        changed = f"The Trainer uploads {str(folder)!r} itself, so the config in it was changed; checkpoints were not."
        warnings.warn(f"{message} {changed}", stacklevel=4)


def _adapters(root: Path) -> list[Path]:
    """Return the folders of the SoftCoT adapters in a folder: itself, and those of PEFT for other names."""
    return [path for path in (root, *sorted(root.glob("*/"))) if read_adapter_config(path) is not None]


def _prepare(root: Path, repo_id: str | None) -> list[str]:
    """Complete the cards and configs of the adapters in a folder; returns the warnings."""
    found = _adapters(root)
    if not found:
        raise ValueError(
            f"`folder` must hold a SoftCoT adapter, got {str(root)!r} without an adapter_config.json of one. Call "
            "`save_pretrained` first."
        )
    if root not in found:
        hide_local_base(root)  # a card of PEFT's alone: the adapters have other names than "default"
    messages = []
    for path in found:
        local = hide_local_names(path)
        write_card(path, repo_id, None if path == root else path.name)
        stored = read_adapter_config(path) or {}
        if local:
            messages.append(local_names_message(local, "default" if path == root else path.name))
        elif is_given(stored):
            messages.append(given_name_message(stored["assistant_model_name_or_path"]))
    return messages
