"""Chains of thoughts (SoftCoT++, arXiv 2505.11484): what stands at the assistant's thought positions in each chain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import SoftCoTConfig
from .frozen_lm import FrozenLM

_TEMPERATURE, _DROPOUT = 1 / 20, 0.5  # of the contrastive term, as published


def contrastive_loss(thoughts: Tensor, temperature: float = _TEMPERATURE, dropout: float = _DROPOUT) -> Tensor:
    """Return a loss that is small if the chains of each row differ (SoftCoT++, arXiv 2505.11484).

    `mean over rows and k of -log softmax_j(cos(T_k, D(T_j)) / tau)[k]`, where `T_k` are the flattened thoughts of a
    chain, and D is dropout. Gradients flow through both sides.

        >>> same = torch.ones(1, 4, 2, 8)
        >>> round(float(contrastive_loss(same, dropout=0.0)), 4)  # log 4
        1.3863

    Args:
        thoughts: Soft thoughts `(B, K, N, H_base)`.
        temperature: tau.
        dropout: Share of values that D sets to zero.

    Returns:
        A float32 scalar.
    """
    flat = thoughts.flatten(2).float()
    dropped = nn.functional.dropout(flat, dropout)
    unit, others = (nn.functional.normalize(vectors, dim=-1) for vectors in (flat, dropped))
    scores = unit @ others.mT / temperature  # (B, K, K)
    targets = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape[:2])
    return nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())


def chain_token_ids(config: SoftCoTConfig, assistant: FrozenLM) -> list[int] | None:
    """Return the ids of the tokens whose embeddings the chains begin with; `None` without chains.

    By default, they are spread evenly over the assistant's vocabulary.

    Raises:
        ValueError: The assistant has no embedding for one of the config's ids.
    """
    if config.chain_init is None and config.num_chains == 1:
        return None
    known, ids = assistant.vocabulary, config.chain_token_ids
    if ids is None:
        return [known * (chain + 1) // (config.num_chains + 1) for chain in range(config.num_chains)]
    if max(ids) >= known:
        raise ValueError(
            f"`chain_token_ids` must have embeddings in the assistant, which has {known}, got {max(ids)}. Choose "
            "other tokens."
        )
    return ids


def trained_embeddings(
    config: SoftCoTConfig, assistant: FrozenLM, ids: list[int], device: torch.device
) -> nn.Embedding:
    """Return the trained embedding of each chain, `weight` `(K, H_embedding)`, which begins as that of a token.

    Args:
        config: The adapter's config. Only with `init_weights`, and for an adapter that is to be trained, the
            assistant's weights are needed.
        assistant: The assistant.
        ids: The tokens' ids, `K` of them.
        device: Where the assistant runs.
    """
    table = nn.Embedding(len(ids), assistant.embedding_size)
    if config.init_weights and not config.inference_mode and table.weight.device.type != "meta":
        start = assistant.embeddings(torch.tensor(ids), torch.device("cpu") if device.type == "meta" else device)
        with torch.no_grad():
            table.weight.copy_(start)
    return table
