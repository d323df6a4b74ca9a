"""Finds a model's thought source whose states can be computed once."""

from __future__ import annotations

from torch import nn

from ..attached import active
from ..passes.host import Host
from ..sources import ThoughtSource


def computable(model: nn.Module) -> tuple[Host, ThoughtSource]:
    """Return the base that carries the thoughts, and the source that reads its prompts.

    Raises:
        ValueError: The model has no active SoftCoT adapter, or training changes what its source reads.
    """
    host, source = active(model)
    if source.learns_to_read and not source.config.inference_mode:
        raise ValueError(
            "`chain_init` must be 'fixed' for thoughts that are computed once, got trained embeddings: training "
            "changes what they were computed with. Let the assistant read in each step, or load the trained adapter "
            "for inference."
        )
    return host, source
