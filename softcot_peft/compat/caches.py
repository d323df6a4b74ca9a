"""Differences between KV caches: their names, their lengths, what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

# The name of a cache among arguments and outputs: "past_key_values" until transformers 5.23, "cache" since.
CACHE_NAME = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values"))
# All names under which models take theirs: `ALL_CACHE_NAMES` of transformers.generation.utils (private, 5.23, 5.24).
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")


def find_cache(arguments: Mapping[str, Any] | tuple[Any, ...]) -> Any:
    """The cache among a forward's arguments or outputs; `None` where there is none."""
    if isinstance(arguments, tuple):
        return next((value for value in arguments if isinstance(value, Cache)), None)
    # Outputs are asked for no other names than they have: for old ones they log a warning (transformers 5.24).
    return next((value for name, value in arguments.items() if name in CACHE_NAMES and value is not None), None)


def cache_length(cache: Any) -> int:
    """Tokens held by a cache, 0 for none; 1 stands for those of state-space models, which cannot tell."""
    if cache is None:
        return 0
    counted = _counted(cache)
    if counted is not None:
        return counted
    return int(cache.has_previous_state()) if hasattr(cache, "has_previous_state") else 1


def counts_tokens(cache: Any) -> bool:
    """Whether a cache knows how many tokens it holds; one of linear attention or state-space layers alone does not."""
    return _counted(cache) is not None


def _counted(cache: Any) -> int | None:
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # it has no such method, or no layer that counts (transformers 5.23)
        return None


def holds_attention_alone(cache: Any) -> bool:
    """Whether a cache holds keys and values and nothing else.

    Recurrent and convolutional states are overwritten in place, which gradients do not survive, and not every such
    layer goes on from them with more than one token (transformers 5.23).
    """
    layers = getattr(cache, "layers", [])  # caches of encoder-decoders have none
    return bool(layers) and not any(hasattr(layer, "recurrent_states") for layer in layers)


def is_dynamic(cache: Any) -> bool:
    """Whether a cache is one that grows with what it is given, rows included, and holds keys and values alone."""
    layers = getattr(cache, "layers", [])
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in layers)


def fixed_length(cache: Any, config: PretrainedConfig) -> int | None:
    """How many tokens a cache of fixed size has room for; `None` where it grows.

    A sliding window drops what leaves it, unless the cache is smaller than the window (transformers 5.23).
    """
    static = [layer for layer in getattr(cache, "layers", []) if isinstance(layer, StaticLayer)]
    if not static:
        return None
    text_config = config.get_text_config(decoder=True)
    windows = [getattr(text_config, name, None) or 0 for name in ("sliding_window", "attention_chunk_size")]
    full = [layer.max_cache_len for layer in static if not layer.is_sliding or layer.max_cache_len < max(windows)]
    return min(full, default=None)
