"""Finds the base and the thought source of a model's active adapter."""

from __future__ import annotations

from torch import nn

from ..attached import hooks_of
from ..passes.host import Host
from ..sources import ThoughtSource


def active(model: nn.Module) -> tuple[Host, ThoughtSource]:
    """Return the base that carries the thoughts, and the source that reads its prompts.

    Raises:
        ValueError: The model has no active SoftCoT adapter.
    """
    host = hooks_of(model).host
    source = host.layer.active_source()
    if source is None:
        raise ValueError(
            "`model` must have an active SoftCoT adapter, but its adapters are disabled. Leave `disable_adapter()` "
            "first."
        )
    if source.learns_to_read and not source.config.inference_mode:
        raise ValueError(
            "`chain_init` must be 'fixed' for thoughts that are computed once, got trained embeddings: training "
            "changes what they were computed with. Let the assistant read in each step, or load the trained adapter "
            "for inference."
        )
    return host, source
