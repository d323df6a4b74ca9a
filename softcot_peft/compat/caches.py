"""Differences between KV caches: names, lengths, contents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

# The name of a cache among arguments and outputs: "past_key_values" until transformers 5.23, "cache" since.
CACHE_NAME = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values"))
# All names of cache arguments: `ALL_CACHE_NAMES` of transformers.generation.utils (private, 5.23, 5.24).
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")


def find_cache(arguments: Mapping[str, Any] | tuple[Any, ...]) -> Any:
    """Return the cache among the arguments or outputs of a forward pass; `None` if there is none."""
    if isinstance(arguments, tuple):
        return next((value for value in arguments if isinstance(value, Cache)), None)
    # Reads only names that an output has: outputs log a warning when old names are read (transformers 5.24).
    return next((value for name, value in arguments.items() if name in CACHE_NAMES and value is not None), None)


def cache_length(cache: Any) -> int:
    """Return the number of cached tokens: 0 without a cache, 1 for state-space models, whose state has no count."""
    if cache is None:
        return 0
    counted = _seq_length(cache)
    if counted is not None:
        return counted
    return int(cache.has_previous_state()) if hasattr(cache, "has_previous_state") else 1


def counts_tokens(cache: Any) -> bool:
    """Return whether a cache counts its tokens; one with only linear-attention or state-space layers does not."""
    return _seq_length(cache) is not None


def _seq_length(cache: Any) -> int | None:
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # no such method, or no layer that counts (transformers 5.23)
        return None


def holds_attention_alone(cache: Any) -> bool:
    """Return whether a cache holds only keys and values.

    Recurrent and convolutional states are overwritten in place, which breaks gradients, and some of these layers
    cannot continue from a state with more than one token (transformers 5.23).
    """
    layers = getattr(cache, "layers", [])  # caches of encoder-decoders have no layers
    return bool(layers) and not any(hasattr(layer, "recurrent_states") for layer in layers)


def is_dynamic(cache: Any) -> bool:
    """Return whether a cache grows with its input, including the batch size, and holds only keys and values."""
    layers = getattr(cache, "layers", [])
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in layers)


def can_crop(cache: Any) -> bool:
    """Whether a cache can be cropped again after a few more tokens: sliding windows drop what leaves them."""
    return is_dynamic(cache) and not any(type(layer) is DynamicSlidingWindowLayer for layer in cache.layers)


def fixed_length(cache: Any, config: PretrainedConfig) -> int | None:
    """Return the capacity in tokens of a cache of fixed size; `None` if the cache grows.

    Sliding-window layers drop tokens that leave the window, unless they are smaller than it (transformers 5.23).
    """
    static = [layer for layer in getattr(cache, "layers", []) if isinstance(layer, StaticLayer)]
    if not static:
        return None
    text_config = config.get_text_config(decoder=True)
    windows = [getattr(text_config, name, None) or 0 for name in ("sliding_window", "attention_chunk_size")]
    full = [layer.max_cache_len for layer in static if not layer.is_sliding or layer.max_cache_len < max(windows)]
    return min(full, default=None)
