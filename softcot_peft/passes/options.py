"""Reads and checks the options of `generate`, with its own precedence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compat.caches import CACHE_NAME, cache_length, find_cache
from ..compat.models import checkpoints
from ..rows.arguments import tokens
from ..rows.placement import Placement

# Default number of new tokens in `generate` (transformers 5.23).
_DEFAULT_MAX_NEW_TOKENS = 20


def _option(name: str, inputs: dict[str, Any], model: PreTrainedModel) -> Any:
    """Look up an option as `generate` does: in the call, the given generation config, then the model's."""
    if inputs.get(name) is not None:
        return inputs[name]
    for config in (inputs.get("generation_config"), model.generation_config):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def max_new(inputs: dict[str, Any], model: PreTrainedModel, length: int) -> int:
    """Return the maximum number of new tokens after prompts of a given length, at least 1."""
    new, longest = (_option(name, inputs, model) for name in ("max_new_tokens", "max_length"))
    if new is None and longest is None:
        longest = getattr(model.config, "max_position_embeddings", None) or length + _DEFAULT_MAX_NEW_TOKENS
        new = min(_DEFAULT_MAX_NEW_TOKENS, longest - length)
    return max(longest - length if new is None else new, 1)


def check_options(inputs: dict[str, Any], model: PreTrainedModel) -> None:
    """Reject options of `generate` that would run the base without thoughts."""
    if _option("is_assistant", inputs, model):  # set for draft models by transformers' candidate generators (5.23)
        raise ValueError(
            "`assistant_model` must not have an active SoftCoT adapter: a draft continues its own cache call by "
            "call, without a prompt for thoughts. Pass the plain base as the draft, or disable the draft's adapter."
        )
    if cache_length(find_cache(inputs)) > 0:
        raise ValueError(
            f"`{CACHE_NAME}` must be empty: thoughts belong to the end of the whole prompt, so a second turn "
            "cannot continue an old cache. Pass the whole conversation in `input_ids`."
        )
    if model.training and checkpoints(model) and _option("use_cache", inputs, model) is not False:
        raise ValueError(
            "`use_cache` must be False while gradient checkpointing is on in training mode, where transformers drops "
            "the cache that `generate` needs. Call `model.eval()` or `gradient_checkpointing_disable()` first."
        )
    rejected = {
        "guidance_scale": lambda value: value not in (None, 1),
        "token_healing": bool,
        "assistant_early_exit": lambda value: value is not None,
        "cache_implementation": lambda value: value == "paged",
    }
    for name, is_rejected in rejected.items():
        value = _option(name, inputs, model)
        if is_rejected(value):
            raise ValueError(
                f"`{name}` must not be {value!r}: it runs the base in a way that cannot carry thoughts. Leave it "
                "out, or disable the adapter."
            )


def check_chunks(inputs: dict[str, Any], model: PreTrainedModel, placement: Placement) -> None:
    """Reject a chunked prefill whose last chunk does not begin before every row's thoughts, which it inserts."""
    size, length = _option("prefill_chunk_size", inputs, model), tokens(inputs).shape[1]
    if size and placement.inserted and (length - 1) // size * size >= placement.earliest:
        raise ValueError(
            f"`prefill_chunk_size` must leave the thoughts in the last chunk, got {size} for prompts of {length} "
            f"tokens with a `response_marker` in column {placement.earliest}. Leave it out, or choose a larger one."
        )


def infer_mask(inputs: dict[str, Any], model: PreTrainedModel) -> Tensor:
    """Return the mask that `generate` infers from the pad token if the caller passes none, `(B, L)`."""
    ids = inputs.get("input_ids")
    pad, eos = (_option(name, inputs, model) for name in ("pad_token_id", "eos_token_id"))
    if ids is None or pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        reference = tokens(inputs)
        return torch.ones(reference.shape[:2], dtype=torch.long, device=reference.device)
    mask = ids != pad
    return (mask | ~mask.any(1, keepdim=True)).long()  # in a row of pad tokens only, they are text
