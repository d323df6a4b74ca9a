"""Tests whether soft thoughts carry information: controls that replace them and statistics that describe them.

A score with soft thoughts means little by itself. Zero vectors in their place may cost only a few points, and thoughts
may collapse to nearly the same vector for every question. Report each score together with its controls.

`model` is always the PEFT model, or the base that the adapter was injected into. Its active adapter is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ._controls import Model, disabled_adapters, replacement, source_of
from ._votes import majority_vote as majority_vote

# Controls of `with_thoughts` and their labels in tables.
CONTROLS = {
    "own": "soft thoughts",
    "none": "no thoughts",
    "zero": "zero vectors",
    "other_question": "another question's",
    "random_projection": "random projection",
    "mean": "average",
}


@contextmanager
def with_thoughts(model: Model, control: str, mean: Tensor | None = None, seed: int = 0) -> Iterator[None]:
    """Replace the soft thoughts of a model within the block. Prompts and thought positions do not change.

    Example:
        ```python
        from softcot_peft.analysis import CONTROLS, mean_thoughts, with_thoughts

        mean = mean_thoughts(model, tokenizer, prompts)
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        for control, label in CONTROLS.items():
            with with_thoughts(model, control, mean):
                output = model.generate(**batch, max_new_tokens=8)
            print(label, tokenizer.batch_decode(output))
        ```

    Args:
        model: A model with an active SoftCoT adapter; for `"own"` and `"none"`, any adapter.
        control: What the base reads in place of the thoughts, a key of `CONTROLS`. `"own"`: the thoughts themselves.
            `"none"`: no thoughts; adapters are disabled. `"zero"`: zero vectors. `"other_question"`: the thoughts of
            the previous row; every batch needs at least two rows, with different questions. `"random_projection"`:
            the source's hidden states, projected by a randomly initialized linear layer. `"mean"`: the same vectors
            for every question.
        mean: The vectors for the control `"mean"`, `(N, H_base)`. See [`mean_thoughts`].
        seed: Random seed for the control `"random_projection"`.

    Raises:
        TypeError: `model` is not a model.
        ValueError: The control is unknown; `mean` is missing or its shape differs from that of the thoughts;
            `"other_question"` gets a batch of one row; or the model has no active SoftCoT adapter.
    """
    if control not in CONTROLS:
        raise ValueError(f"`control` must be one of {tuple(CONTROLS)}, got {control!r}.")
    if control == "mean" and mean is None:
        raise ValueError("`mean` must be given for the control 'mean', got None. Compute it with `mean_thoughts`.")
    if control == "own":
        yield
    elif control == "none":
        with disabled_adapters(model):
            yield
    else:
        handle = source_of(model).register_forward_hook(replacement(control, mean, seed))
        try:
            yield
        finally:
            handle.remove()


@torch.no_grad()
def collect_thoughts(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int = 32,
    *,
    chain: int = 0,
    **tokenization: Any,
) -> Tensor:
    """Compute the soft thoughts of prompts.

    Example:
        ```python
        from softcot_peft.analysis import collect_thoughts, nearest_tokens, thought_norms, thought_similarity

        thoughts = collect_thoughts(model, tokenizer, prompts)
        print(thought_similarity(thoughts))  # near 1 everywhere: the thoughts have collapsed
        print(thought_norms(model, thoughts)["ratio"])
        print(nearest_tokens(model, tokenizer, thoughts)[0])  # for the first question
        ```

    Args:
        model: A model in eval mode with an active SoftCoT adapter.
        tokenizer: The base's tokenizer.
        prompts: One prompt per question, all with the same number of thoughts.
        batch_size: Number of prompts per forward pass.
        chain: The chain whose thoughts to compute, for adapters with several (`num_chains`).
        **tokenization: Arguments of the tokenizer, such as `add_special_tokens=False` for rendered chat templates.

    Returns:
        The thoughts of Q prompts, `(Q, N, H_base)`, in the projection's dtype, on the CPU.

    Raises:
        TypeError: `prompts` is a single string, or `chain` is not an integer.
        ValueError: `prompts` is empty, the numbers of thoughts differ, the adapter does not have the chain, or no
            SoftCoT adapter is active.
    """
    if isinstance(prompts, str):
        raise TypeError("`prompts` must be a list of strings, got str. Put a single prompt into a list.")
    if len(prompts) == 0:
        raise ValueError("`prompts` must hold at least one prompt, got none.")
    seen: list[Tensor] = []
    handle = source_of(model).register_forward_hook(
        lambda module, args, thoughts: seen.append(thoughts.flatten(0, 1).cpu())
    )
    try:
        for start in range(0, len(prompts), batch_size):
            texts = list(prompts[start : start + batch_size])
            rows = tokenizer(texts, return_tensors="pt", padding=True, **tokenization)
            model(**rows.to(model.device), logits_to_keep=1, chains=chain)
    finally:
        handle.remove()
    numbers = sorted({thoughts.shape[-2] for thoughts in seen})
    if len(numbers) > 1:
        raise ValueError(f"`prompts` must have one number of thoughts, got {numbers}. Write runs of one length.")
    return torch.cat(seen)


def mean_thoughts(model: Model, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], **options: Any) -> Tensor:
    """Average the thoughts over questions, for the control `"mean"` of [`with_thoughts`]; see there for an example.

    Takes the same arguments and raises the same errors as [`collect_thoughts`].

    Returns:
        The mean thoughts, `(N, H_base)`, in the projection's dtype, on the CPU.
    """
    return collect_thoughts(model, tokenizer, prompts, **options).mean(0)


def thought_similarity(thoughts: Tensor) -> Tensor:
    """Compute the cosine similarity between the thoughts of each pair of questions, averaged over thought positions.

    Args:
        thoughts: `(Q, N, H)`; see [`collect_thoughts`] for an example.

    Returns:
        The similarities, `(Q, Q)`, in float32; 1 on the diagonal.
    """
    unit = nn.functional.normalize(thoughts.float(), dim=-1)
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


def nearest_tokens(
    model: Model, tokenizer: PreTrainedTokenizerBase, thoughts: Tensor, count: int = 3
) -> list[list[list[str]]]:
    """Find the tokens whose embeddings have the highest cosine similarity with each thought.

    Args:
        model: A model with or without a SoftCoT adapter.
        tokenizer: The base's tokenizer.
        thoughts: `(Q, N, H_base)`; see [`collect_thoughts`] for an example.
        count: Number of tokens to return per thought.

    Returns:
        Tokens by question, thought position and rank, nearest first.
    """
    table = _token_embeddings(model)[: len(tokenizer)]  # some bases have more embeddings than tokens
    unit, unit_table = (nn.functional.normalize(vectors.cpu().float(), dim=-1) for vectors in (thoughts, table))
    ids = (unit @ unit_table.T).topk(count, dim=-1).indices.tolist()
    return [[list(tokenizer.convert_ids_to_tokens(ranked)) for ranked in question] for question in ids]


@torch.no_grad()
def attention_to_thoughts(model: Model, input_ids: Tensor, thought_token_id: int, **options: Any) -> Tensor:
    """Compute the share of attention that each later token pays to the thoughts, per layer, averaged over heads.

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
        **options: Further arguments of the base's forward.

    Returns:
        The shares, `(layers, L - end of the run)`, between 0 and 1.

    Raises:
        ValueError: `input_ids` has no run or several rows, or the base returns no attentions.
    """
    is_thought = input_ids[0] == thought_token_id
    if len(input_ids) != 1 or not is_thought.any():
        raise ValueError(f"`input_ids` must be one row with a run of {thought_token_id}, got {input_ids.tolist()}.")
    attentions = model(input_ids=input_ids, output_attentions=True, **options).attentions
    if not attentions or attentions[0] is None:
        raise ValueError("The base must return attentions, got none. Load it with `attn_implementation='eager'`.")
    end = int(is_thought.nonzero().max()) + 1
    layers = torch.stack([layer[0].float().mean(0) for layer in attentions])  # (layers, L, L)
    return layers[:, end:, is_thought].sum(-1)


@torch.no_grad()
def _token_embeddings(model: Model) -> Tensor:
    """Return all token embeddings as the base reads them, including any scaling, `(V, H_base)`."""
    embedding: Any = model.get_input_embeddings()
    embeddings: Tensor = embedding(torch.arange(len(embedding.weight), device=embedding.weight.device)[None])
    return embeddings[0]
