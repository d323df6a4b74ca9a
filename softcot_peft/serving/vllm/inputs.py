"""What vLLM is given for a prompt with thoughts, and what its outputs say about the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def with_thoughts(input_ids: Sequence[int], embeds: Tensor, adapter: str, salt: str | None = None) -> dict[str, Any]:
    """Return a prompt of vLLM: the embeddings `(L + N, H)`, and ids for what looks at ids.

    All positions are read from the embeddings, so that the engine's prefix cache, whose keys hash ids and embeddings,
    tells prompts apart by everything the base reads. The ids serve repetition penalties, which count the prompt's
    tokens, and detokenisation, which continues its last ones. The N ids too many repeat the first one and stand before
    the prompt, where they change neither.

    Args:
        input_ids: The prompt's ids, L of them.
        embeds: Its embeddings with thoughts; `(L, H)` if the prompt has a run of thought tokens.
        adapter: Name of the adapter. Prompts of different adapters share no cache entries.
        salt: The request's own `cache_salt`.
    """
    ids = list(input_ids)
    return {
        "prompt_embeds": embeds.detach().cpu().contiguous(),
        "prompt_token_ids": [ids[0]] * (len(embeds) - len(ids)) + ids,
        "prompt_is_token_ids": [False] * len(embeds),
        "cache_salt": f"softcot:{adapter}:{salt or ''}",
    }


def without_thoughts(output: Any, input_ids: Sequence[int]) -> Any:
    """Make an output of vLLM speak of the caller's prompt: its ids, and how many of them were cached."""
    if output.prompt_token_ids is not None:
        output.prompt_token_ids = list(input_ids)
    if output.num_cached_tokens is not None:
        output.num_cached_tokens = min(output.num_cached_tokens, len(input_ids))
    return output
