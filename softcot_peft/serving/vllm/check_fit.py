"""Checks that an engine reads embeddings as it reads tokens, before it is given thoughts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .inputs import Embedded, with_thoughts

_TOLERANCE = {torch.float32: 1e-3}  # of log-probabilities
_TOLERANCE_OF_HALVES = 0.1

SAMPLING = {"temperature": 0, "max_tokens": 1, "logprobs": 1}  # what has to be known of the next token
IDS = tuple(range(3, 19))  # ids that every vocabulary has; the same are sent as ids and as embeddings


def prompts(embeddings: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return the same prompt as ids and as embeddings.

    Args:
        embeddings: The base's input embedding, as adapters read it.
        dtype: The engine's dtype.
    """
    with torch.no_grad():
        embeds = embeddings(torch.tensor([IDS], device=embeddings.weight.device))[0].to(dtype)
    return [{"prompt_token_ids": list(IDS)}, with_thoughts(IDS, Embedded(embeds, [False] * len(IDS)), "check")]


def check_outputs(outputs: Sequence[Any], dtype: torch.dtype) -> None:
    """Compare what the engine makes of the two.

    They differ for bases that scale their embeddings in one implementation before and in the other after the place
    where embeddings are put in, and for an embedding matrix of other weights than those that are served.

    Raises:
        ValueError: The log-probabilities of the next token differ.
    """
    first, second = ({token: at.logprob for token, at in out.outputs[0].logprobs[0].items()} for out in outputs)
    shared = first.keys() & second.keys()
    tolerance = _TOLERANCE.get(dtype, _TOLERANCE_OF_HALVES)
    if not shared or any(abs(first[token] - second[token]) > tolerance for token in shared):
        raise ValueError(
            "The engine must compute the same from embeddings as from tokens to serve SoftCoT adapters, but the "
            f"log-probabilities of a test prompt are {first} from tokens and {second} from embeddings. Either vLLM "
            "scales this base's embeddings in another place than transformers, or it serves other weights than those "
            "in the base's folder."
        )
