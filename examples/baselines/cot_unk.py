"""CoT-Unk: placeholders in the place of soft thoughts at the end of the prompt, untrained or with trained embeddings.

The untrained form is a baseline of the SoftCoT paper (Xu et al. 2025, arXiv 2502.12134) and measures the effect of N
more positions alone. The trained form is prompt tuning (Lester et al. 2021, arXiv 2104.08691) with its vectors at
SoftCoT's thought positions, and measures the effect of thoughts that do not depend on the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .common import Baseline


class CotUnk(Baseline):
    """Append one token N times to the prompt. Nothing is trained.

    Args:
        base: Folder of the base.
        num_placeholders: N.
        placeholder: A token of the base's vocabulary. `None`: its unk token, else its eos token.
        **settings: Arguments of [`Baseline`].

    Raises:
        ValueError: If the placeholder is not a token of the base.
    """

    def __init__(
        self, base: str | Path, num_placeholders: int = 8, placeholder: str | None = None, **settings: Any
    ) -> None:
        self.num_placeholders = num_placeholders
        super().__init__(base, **settings)
        token = placeholder or self.tokenizer.unk_token or self.tokenizer.eos_token
        if token not in self.tokenizer.get_vocab():
            raise ValueError(
                f"`placeholder` must be a token of the base's vocabulary, got {token!r}. Name a special token."
            )
        self.placeholder_id = self.tokenizer.convert_tokens_to_ids(token)

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the ids of the prompts with their placeholders."""
        return [[*ids, *[self.placeholder_id] * self.num_placeholders] for ids in super().prompt_ids(prompts)]


class Placeholders(nn.Module):
    """An input embedding with trained vectors for ids beyond the vocabulary.

    Args:
        embedding: The base's input embedding, `(V, H)`.
        number: N. Ids V to V + N - 1 are the placeholders.
    """

    def __init__(self, embedding: nn.Module, number: int) -> None:
        super().__init__()
        self.embedding = embedding
        drawn = torch.randint(len(embedding.weight), (number,))
        self.vectors = nn.Parameter(embedding.weight.detach()[drawn].clone())  # (N, H)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids `(B, L)` to embeddings `(B, L, H)`."""
        first = len(self.embedding.weight)
        known = self.embedding(ids.clamp(max=first - 1))
        return torch.where((ids >= first)[..., None], self.vectors[(ids - first).clamp(min=0)], known)


class TrainedPlaceholders(CotUnk):
    """CoT-Unk with a trained embedding for each of the N placeholders, initialized from random tokens."""

    default_learning_rate = 3e-2

    def attach(self, base: PreTrainedModel) -> PreTrainedModel:
        """Return the base with N more ids that can be read but not generated."""
        base.set_input_embeddings(Placeholders(base.get_input_embeddings(), self.num_placeholders))
        return base

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the ids of the prompts with placeholders V to V + N - 1."""
        first = len(self.model.get_input_embeddings().embedding.weight)
        return [[*ids, *range(first, first + self.num_placeholders)] for ids in Baseline.prompt_ids(self, prompts)]
