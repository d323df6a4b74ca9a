"""What a thought source is given: facts about the base, the prompts of a batch, precomputed states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class BaseLM:
    """The facts about the base LM that a source may use."""

    name_or_path: str | None
    hidden_size: int  # width of its input embeddings
    vocab_size: int | None  # number of ids with an embedding; `None` if unknown
    model: PreTrainedModel  # the base itself, which is frozen


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch: only the attended tokens before the thoughts."""

    input_ids: Tensor  # ids of the base, `(B, P)`; prompts end in the last column
    attention_mask: Tensor  # `(B, P)`, 1 = part of the prompt
    device: torch.device  # device of the base's input embeddings, and of the states to return
    chains: tuple[int, ...] = (0,)  # the chains to read, C of them, each below `num_chains`


class Precomputed(Protocol):
    """Precomputed states; see [`use_thoughts`]."""

    def find(self, prompt_ids: Tensor, prompt_mask: Tensor, num_thoughts: int) -> Tensor | None:
        """Return the states of a batch's prompts, `(B, K * N * H_source)`, or `None` if any is missing."""
