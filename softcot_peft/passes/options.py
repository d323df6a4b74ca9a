"""The options of `generate`, looked up where it looks for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compat.caches import CACHE_NAME, cache_length, find_cache
from ..compat.models import checkpoints
from ..rows.arguments import tokens

# How many tokens `generate` writes where nobody says (transformers 5.23).
_DEFAULT_NEW = 20


def _option(name: str, inputs: dict[str, Any], model: PreTrainedModel) -> Any:
    """A generation option from where `generate` looks for it: the call, the config passed, the model's config."""
    if inputs.get(name) is not None:
        return inputs[name]
    for config in (inputs.get("generation_config"), model.generation_config):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def most_new(inputs: dict[str, Any], model: PreTrainedModel, length: int) -> int:
    """How many tokens `generate` may write after prompts of a length, at least 1."""
    new, longest = (_option(name, inputs, model) for name in ("max_new_tokens", "max_length"))
    if new is None and longest is None:
        longest = getattr(model.config, "max_position_embeddings", None) or length + _DEFAULT_NEW
        new = min(_DEFAULT_NEW, longest - length)
    return max(longest - length if new is None else new, 1)


def check_options(inputs: dict[str, Any], model: PreTrainedModel) -> None:
    """Reject options of `generate` under which the base would run without its thoughts."""
    if _option("is_assistant", inputs, model):  # as transformers' candidate generators call their draft (5.23)
        raise ValueError(
            "`assistant_model` must not have an active SoftCoT adapter: a draft goes on from its own cache, call by "
            "call, and has no prompt for thoughts. Pass the plain base as the draft, or disable the draft's adapter."
        )
    if cache_length(find_cache(inputs)) > 0:
        raise ValueError(
            f"`{CACHE_NAME}` must be empty: thoughts belong to the end of the whole prompt, so a second turn "
            "cannot continue an old cache. Pass the whole conversation in `input_ids`."
        )
    if model.training and checkpoints(model) and _option("use_cache", inputs, model) is not False:
        raise ValueError(
            "`use_cache` must be False while gradient checkpointing is on in training mode, where transformers drops "
            "the cache that `generate` goes on from. Call `model.eval()` or `gradient_checkpointing_disable()` first."
        )
    refused = {
        "guidance_scale": lambda value: value not in (None, 1),
        "token_healing": bool,
        "assistant_early_exit": lambda value: value is not None,
        "cache_implementation": lambda value: value == "paged",
    }
    for name, refuses in refused.items():
        value = _option(name, inputs, model)
        if refuses(value):
            raise ValueError(
                f"`{name}` must not be {value!r}: it runs the base in a way that cannot carry thoughts. Leave it "
                "out, or disable the adapter."
            )


def infer_mask(inputs: dict[str, Any], model: PreTrainedModel) -> Tensor:
    """The mask that `generate` infers from the pad token where the caller gives none: `(B, L)`."""
    ids = inputs.get("input_ids")
    pad, eos = (_option(name, inputs, model) for name in ("pad_token_id", "eos_token_id"))
    if ids is None or pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        reference = tokens(inputs)
        return torch.ones(reference.shape[:2], dtype=torch.long, device=reference.device)
    mask = ids != pad
    return (mask | ~mask.any(1, keepdim=True)).long()  # a row of these alone is a text of them
