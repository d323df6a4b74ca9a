"""Computes the soft thoughts of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .active import Model, source_of


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
