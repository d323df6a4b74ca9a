"""Describes soft thoughts in numbers: similarity, norms, nearest tokens, attention."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .active import Model, source_of

Tokens: TypeAlias = list[list[list[str]]]
ScoredTokens: TypeAlias = list[list[list[tuple[str, float]]]]


def thought_similarity(thoughts: Tensor, between: Literal["questions", "positions"] = "questions") -> Tensor:
    """Compute the cosine similarity between the thoughts of questions, or between the thoughts within a question.

    Args:
        thoughts: `(Q, N, H)`; see [`collect_thoughts`] for an example.
        between: `"questions"`: between each pair of questions, averaged over thought positions. `"positions"`: between
            each pair of thought positions, averaged over questions.

    Returns:
        The similarities, `(Q, Q)` or `(N, N)`, in float32; 1 on the diagonal.

    Raises:
        ValueError: `between` is neither of the two.
    """
    if between not in ("questions", "positions"):
        raise ValueError(f"`between` must be 'questions' or 'positions', got {between!r}.")
    unit = nn.functional.normalize(thoughts.float(), dim=-1)
    if between == "positions":
        return torch.einsum("qih,qjh->ij", unit, unit) / thoughts.shape[0]
    return torch.einsum("inh,jnh->ij", unit, unit) / thoughts.shape[1]


def thought_norms(model: Model, thoughts: Tensor) -> dict[str, float]:
    """Compute the median Euclidean norm of the thoughts and of the base's token embeddings.

    Args:
        model: A model with or without a SoftCoT adapter.
        thoughts: `(Q, N, H_base)`; see [`collect_thoughts`] for an example.

    Returns:
        A dict with `"thoughts"`, `"tokens"` and `"ratio"`, the first divided by the second.
    """
    of_thoughts, of_tokens = (
        float(vectors.float().norm(dim=-1).median()) for vectors in (thoughts, _token_embeddings(model))
    )
    return {"thoughts": of_thoughts, "tokens": of_tokens, "ratio": of_thoughts / of_tokens}


@overload
def nearest_tokens(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    thoughts: Tensor,
    count: int = ...,
    *,
    similarities: Literal[False] = ...,
) -> Tokens: ...


@overload
def nearest_tokens(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    thoughts: Tensor,
    count: int = ...,
    *,
    similarities: Literal[True],
) -> ScoredTokens: ...


def nearest_tokens(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    thoughts: Tensor,
    count: int = 3,
    *,
    similarities: bool = False,
) -> Tokens | ScoredTokens:
    """Find the tokens whose embeddings have the highest cosine similarity with each thought.

    Args:
        model: A model with or without a SoftCoT adapter.
        tokenizer: The base's tokenizer.
        thoughts: `(Q, N, H_base)`; see [`collect_thoughts`] for an example.
        count: Number of tokens to return per thought.
        similarities: Whether to return each token together with its cosine similarity, as `(token, similarity)`.

    Returns:
        Tokens by question, thought position and rank, nearest first.
    """
    table = _token_embeddings(model)[: len(tokenizer)]  # some bases have more embeddings than tokens
    unit, unit_table = (nn.functional.normalize(vectors.cpu().float(), dim=-1) for vectors in (thoughts, table))
    best = (unit @ unit_table.T).topk(count, dim=-1)
    tokens = [[list(tokenizer.convert_ids_to_tokens(ids)) for ids in rows] for rows in best.indices.tolist()]
    if not similarities:
        return tokens
    return [
        [list(zip(*thought, strict=True)) for thought in zip(*question, strict=True)]
        for question in zip(tokens, best.values.tolist(), strict=True)
    ]


@torch.no_grad()
def attention_to_thoughts(
    model: Model, input_ids: Tensor, thought_token_id: int, *, per_head: bool = False, **options: Any
) -> Tensor:
    """Compute the share of attention that each later token pays to the thoughts, per layer or per head.

    The prompt must contain a run of the thought token, because outputs omit the columns of inserted thoughts.

    Example:
        ```python
        from softcot_peft.analysis import attention_to_thoughts

        model.get_base_model().set_attn_implementation("eager")  # other implementations return no attentions
        ids = tokenizer(prompts[0] + "<thought>" * 4 + " 28", return_tensors="pt").input_ids
        shares = attention_to_thoughts(model, ids, tokenizer.convert_tokens_to_ids("<thought>"))
        ```

    Args:
        model: A model with an active SoftCoT adapter.
        input_ids: One row with prompt, run and response, `(1, L)`.
        thought_token_id: Id of the thought token.
        per_head: Whether to return the shares of each head instead of their average.
        **options: Further arguments of the base's forward.

    Returns:
        The shares, `(layers, L - end of the run)`, between 0 and 1; with `per_head`, `(layers, heads, L - end of the
        run)`.

    Raises:
        ValueError: `input_ids` has no run or several rows, the adapter has another thought token or none, or the base
            returns no attentions.
    """
    is_thought = input_ids[0] == thought_token_id
    if len(input_ids) != 1 or not is_thought.any():
        raise ValueError(f"`input_ids` must be one row with a run of {thought_token_id}, got {input_ids.tolist()}.")
    own = source_of(model).thought_token_id
    if own != thought_token_id:  # the run would be plain tokens
        raise ValueError(
            f"`thought_token_id` must be the id of the adapter's `thought_token`, {own}, got {thought_token_id}."
            + " Set `thought_token` in the adapter's config before it is loaded." * (own is None)
        )
    attentions = model(input_ids=input_ids, output_attentions=True, **options).attentions
    if not attentions or attentions[0] is None:
        raise ValueError("The base must return attentions, got none. Load it with `attn_implementation='eager'`.")
    end = int(is_thought.nonzero().max()) + 1
    heads = torch.stack([layer[0, :, end:, is_thought].float().sum(-1) for layer in attentions])  # (layers, heads, T)
    return heads if per_head else heads.mean(1)


@torch.no_grad()
def _token_embeddings(model: Model) -> Tensor:
    """Return all token embeddings as the base reads them, including any scaling, `(V, H_base)`."""
    embedding: Any = model.get_input_embeddings()
    embeddings: Tensor = embedding(torch.arange(len(embedding.weight), device=embedding.weight.device)[None])
    return embeddings[0]
