"""Completes model cards where PEFT and transformers write or upload them without the adapter's config."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from .checkpoint.card import restore_tags, tags_in
from .checkpoint.upload import complete_after_trainer, prepare_copy
from .guards import WrappedMethod

# `push_to_hub` saves the model, writes the repository's card over the saved one, and then calls this method, which is
# private but the last before the upload (transformers 5.19 to 5.24).
UPLOAD = "_upload_modified_files"
CARD = "create_or_update_model_card"  # a method of PeftModel, which `Trainer.create_model_card` ends with


def follow_uploads(model: nn.Module) -> None:
    """Wrap the methods of a `PeftModel` that write or upload model cards, unless they are wrapped."""
    for name, function in ((UPLOAD, upload), (CARD, update_card)):
        if hasattr(model, name) and not isinstance(model.__dict__.get(name), WrappedMethod):
            WrappedMethod(model, name, function)


def upload(original: Callable[..., Any], working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """Prepare the files of SoftCoT adapters in a folder, and upload them."""
    prepare_copy(working_dir, repo_id)
    return original(working_dir, repo_id, *args, **kwargs)


def update_card(original: Callable[..., Any] | None, output_dir: str | os.PathLike[str]) -> None:
    """Update a card as PEFT does, and complete it if the Trainer has just written it."""
    if original is not None:
        tags = tags_in(output_dir)
        original(output_dir)
        restore_tags(output_dir, tags)  # PEFT replaces them by its own
    complete_after_trainer(output_dir)


class BareCard:
    """`create_or_update_model_card` of a base that has an adapter without being a `PeftModel`.

    `Trainer.create_model_card` calls it for every model whose card says `library_name: peft`.
    """

    def __call__(self, output_dir: str | os.PathLike[str]) -> None:
        """Complete the card in a folder if the Trainer has just written it."""
        update_card(None, output_dir)
