"""What vLLM is given for a prompt with thoughts, and what its outputs say about the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Embedded:
    """A prompt with thoughts."""

    embeds: Tensor  # what the base reads, `(L + N, H)`; `(L, H)` if the prompt has a run of thought tokens
    is_token: list[bool]  # for each position, whether it is one of the prompt's tokens; the others are thoughts


def find_tokens(embeds: Tensor, tokens: Tensor) -> Embedded:
    """Tell tokens from thoughts in the embeddings of a prompt.

    Args:
        embeds: `(L + N, H)` with N inserted thoughts, or `(L, H)` with thoughts over a run of thought tokens.
        tokens: Embeddings of the prompt's tokens, `(L, H)`.
    """
    length, inserted = len(tokens), len(embeds) - len(tokens)
    same = (embeds[:length] == tokens).all(-1)
    if inserted == 0:
        return Embedded(embeds, same.tolist())
    start = length if same.all() else int(same.int().argmin())
    if not torch.equal(embeds[start + inserted :], tokens[start:]):
        return Embedded(embeds, [False] * len(embeds))
    return Embedded(embeds, [True] * start + [False] * inserted + [True] * (length - start))


def with_thoughts(
    input_ids: Sequence[int], embedded: Embedded, adapter: str, salt: str | None = None
) -> dict[str, Any]:
    """Return a prompt of vLLM: ids at tokens, embeddings at thoughts.

    The engine looks ids up by itself, and counts them in repetition penalties. Embeddings are given for all positions:
    keys of the prefix cache hash them, so that they tell prompts apart by everything the base reads. The ids at
    thoughts repeat the prompt's first one, which changes no penalty and no text.

    Args:
        input_ids: The prompt's ids, L of them.
        embedded: The prompt with thoughts.
        adapter: Name of the adapter. Prompts of different adapters share no cache entries.
        salt: The request's own `cache_salt`.
    """
    ids = list(input_ids)
    if len(embedded.embeds) != len(ids):
        rest = iter(ids)
        ids = [next(rest) if token else ids[0] for token in embedded.is_token]
    return {
        "prompt_embeds": embedded.embeds.detach().cpu().contiguous(),
        "prompt_token_ids": ids,
        "prompt_is_token_ids": embedded.is_token,
        "cache_salt": f"softcot:{adapter}:{salt or ''}",
    }


def without_thoughts(output: Any, input_ids: Sequence[int]) -> Any:
    """Make an output of vLLM speak of the caller's prompt: its ids, and how many of them were cached."""
    if output.prompt_token_ids is not None:
        output.prompt_token_ids = list(input_ids)
    if output.num_cached_tokens is not None:
        output.num_cached_tokens = min(output.num_cached_tokens, len(input_ids))
    return output
