"""Finds the active adapter of a model, and disables adapters, for the other modules of `analysis`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from peft import PeftModel
from transformers import PreTrainedModel

from ..attached import hooks_of
from ..sources import ThoughtSource

Model: TypeAlias = PeftModel | PreTrainedModel


def source_of(model: Model) -> ThoughtSource:
    """Return the active adapter's source, whose `forward` maps states to soft thoughts `(B, K, N, H_base)`."""
    source = hooks_of(model).host.layer.active_source()
    if source is None:
        raise ValueError("`model` must have an active SoftCoT adapter, got disabled ones. Leave `disable_adapter()`.")
    return source


@contextmanager
def disabled_adapters(model: Model) -> Iterator[None]:
    """Disable adapters within the block, whether PEFT or transformers attached them."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
