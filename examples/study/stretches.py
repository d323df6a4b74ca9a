"""A thought source that reads the question itself: the assistant's mean states over N stretches of its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softcot_peft.sources import AssistantSource, Prompts, register_source


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

    def read(self, prompts: Prompts, num_thoughts: int) -> Tensor:
        """Return the mean states, `(B, 1, N, H_assistant)`."""
        ids, mask = self.reader.read(prompts.input_ids, prompts.attention_mask, num_thoughts)
        return self.means(ids, mask, num_thoughts, prompts.device)

    def read_own(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        num_thoughts: int,
        rows: int,
        device: torch.device,
        chains: tuple[int, ...] = (0,),
    ) -> Tensor:
        """As `read`, for an assistant input `(B, P + N)`."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.means(input_ids, mask, num_thoughts, device)

    def means(self, ids: Tensor, mask: Tensor, number: int, device: torch.device) -> Tensor:
        """Read ids `(B, P + N)` without their N thought positions."""
        ids, mask = ids[:, :-number], mask[:, :-number]
        states = self.assistant.hidden_states(ids, mask, ids.shape[1], device, self)
        return stretched(states, mask.to(device), number)[:, None]

    def fingerprint(self) -> dict[str, Any]:
        """As of the source `"assistant"`, with another name."""
        return super().fingerprint() | {"thought_source": self.kind}
