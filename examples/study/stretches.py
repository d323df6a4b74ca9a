"""A thought source that reads the question itself: the assistant's mean states over N stretches of its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softcot_peft.sources import AssistantSource, register_source


def stretched(states: Tensor, mask: Tensor, number: int) -> Tensor:
    """Return the means over N stretches of each row, of as nearly the same length as can be.

    Rows shorter than N repeat tokens.

    Args:
        states: `(B, L, H)`.
        mask: `(B, L)`, 1 = part of the row; padding is on the left.
        number: N.

    Returns:
        `(B, N, H)`.
    """
    length = mask.sum(1, keepdim=True)  # (B, 1)
    place = mask.cumsum(1) - mask  # of each token in its row, (B, L)
    bounds = torch.arange(number + 1, device=mask.device) * length // number  # (B, N + 1)
    first, last = bounds[:, :-1, None], torch.maximum(bounds[:, 1:], bounds[:, :-1] + 1)[..., None]
    inside = (first <= place[:, None]) & (place[:, None] < last) & (mask[:, None] != 0)  # (B, N, L)
    weights = inside.to(states.dtype) / inside.sum(-1, keepdim=True).clamp(min=1)
    return weights @ states


@register_source("question_stretches")
class QuestionStretches(AssistantSource):
    """Reads the same input as [`AssistantSource`], but takes the states of the input, not of the thought positions.

    Args:
        config: As of the source `"assistant"`, without trained embeddings.
        base: The base LM.
    """

    def _run(
        self, ids: Tensor, mask: Tensor, num_thoughts: int, device: torch.device, chains: tuple[int, ...]
    ) -> Tensor:
        """Read `(B, P + N)` without its N thought positions, and return the mean states, `(B, 1, N, H_assistant)`."""
        ids, mask = ids[:, :-num_thoughts], mask[:, :-num_thoughts]
        states = self.assistant.hidden_states(ids, mask, ids.shape[1], device, self)
        return stretched(states, mask.to(device), num_thoughts)[:, None]

    def fingerprint(self) -> dict[str, Any]:
        """As of the source `"assistant"`, with another name."""
        return super().fingerprint() | {"thought_source": self.kind}
