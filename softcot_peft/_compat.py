"""What differs between models and between versions of transformers, each with its reason."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.integrations import deepspeed
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

_F = TypeVar("_F", bound=Callable[..., Any])

# The name of a cache among arguments and outputs: "past_key_values" until transformers 5.23, "cache" since.
CACHE_NAME = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values"))
# All names under which models take theirs: `ALL_CACHE_NAMES` of transformers.generation.utils (private, 5.23, 5.24).
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")

# Arguments with which packed and padding-free batches announce themselves to attention kernels (transformers 5.23).
PACKED_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "block_table")

_WIDEST = 2**16  # hidden states, several times those of the widest published LM

# Where `accelerate launch` says that processes but the first are to leave weights empty (accelerate 1.15).
_FSDP_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def check_decoder_lm(config: PretrainedConfig, what: str, remedy: str, model: nn.Module | None = None) -> None:
    """Refuse a model that is not a decoder language model.

    Args:
        config: Config of the model.
        what: What the model is, for the message.
        remedy: What to do, for the message.
        model: The model, if it is loaded: a type may map to a class whose own config is a part of the type's.

    Raises:
        ValueError: It is an encoder-decoder, an encoder, or no language model.
    """
    text_config = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        kind = "an encoder-decoder"
    elif not _is_causal_lm(config, text_config, model):
        kind = "no causal LM known to transformers"
    elif _looks_ahead(text_config):
        kind = "an encoder: its config lets tokens attend to later ones"
    elif model is not None and accepts(type(model).forward, "shared_kv_states"):  # those of Gemma 4 (5.23)
        kind = "a draft model that reads another one's keys and values"
    else:
        return
    raise ValueError(f"{what} must be a decoder LM, but its type {config.model_type!r} is {kind}. {remedy}")


def _is_causal_lm(config: PretrainedConfig, text_config: PretrainedConfig, model: nn.Module | None) -> bool:
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) in mapping or type(text_config) in mapping:
        return True
    return model is not None and type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _looks_ahead(config: PretrainedConfig) -> bool:
    """Whether a config of a type that can be a decoder makes it something else (fields of transformers 5.23)."""
    # BERT and its kin: encoders unless told otherwise. GPT-NeoX has the first field too, and does not look at it.
    if hasattr(config, "is_decoder") and hasattr(config, "add_cross_attention"):
        return not config.is_decoder
    return (
        getattr(config, "causal", True) is False  # XLM
        or getattr(config, "attn_type", None) == "bi"  # XLNet
        or getattr(config, "use_bidirectional_attention", None) in (True, "all")  # Gemma and its kin
    )


def head_width(model: PreTrainedModel) -> int:
    """Width of a causal LM's last hidden states: what its head reads.

    `config.hidden_size` is not it everywhere (OPT-350M projects to another width before its head).
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"The assistant must be a causal LM with its head, got {type(model).__name__}. Load it with "
            "`AutoModelForCausalLM`."
        )
    width = int(getattr(head, "in_features", None) or head.weight.shape[-1])
    if width > _WIDEST:
        raise ValueError(f"The assistant's hidden states must be at most {_WIDEST} wide, got {width}. No LM is wider.")
    return width


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """A causal LM without its head.

    `base_model` is the whole model where `base_model_prefix` is not the backbone's name (Llama4ForCausalLM,
    transformers 5.23); there it is the transformers model inside.
    """
    for found in (model.base_model, *model.children()):
        if found is not model and isinstance(found, PreTrainedModel):
            return found
    raise ValueError(
        f"The assistant must be a causal LM with a backbone of its own, got {type(model).__name__}. Choose another "
        "assistant."
    )


def is_table(module: nn.Module) -> bool:
    """Whether a module is one table of embeddings; models that write several codebooks have a list of them."""
    return isinstance(getattr(module, "weight", None), Tensor)


def position_limit(config: PretrainedConfig) -> int | None:
    """How many tokens the model has positions for; `None` where there is no limit.

    Rotary positions, which transformers 5 describes in `rope_parameters`, go on beyond `max_position_embeddings`; that
    is the length of a table in models that have one.
    """
    text_config = config.get_text_config(decoder=True)
    if getattr(text_config, "rope_parameters", None):
        return None
    limit = getattr(text_config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def rotary_switch(config: PretrainedConfig) -> int | None:
    """Length of rows beyond which the rotary frequencies of a whole pass change; `None` where they never do.

    They are chosen by the largest position of a pass (fields of transformers 5.23; one dict, or one for each type of
    layer).
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = parameters.values() if all(isinstance(value, dict) for value in parameters.values()) else [parameters]
    longest: int = getattr(config, "max_position_embeddings", 0)
    limits: list[int] = [
        kind.get("original_max_position_embeddings", longest)
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


def checkpoints(model: nn.Module) -> bool:
    """Whether a model recomputes activations in the backward pass, and therefore keeps no cache.

    The flag stands on the modules that do it; the model's own name for it changed (transformers 5.23).
    """
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody has hooked a module's forward (torch 2.6 to 2.13 has no public way to ask)."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def ordinary_token(model: PreTrainedModel) -> int:
    """An id that has an embedding and is not padding: beginning or end of sequence, else 0.

    Configs of some types lack these fields, and those of models with a smaller vocabulary keep the ids of the larger
    one (transformers 5.23).
    """
    text_config = model.config.get_text_config(decoder=True)
    padding, most = getattr(text_config, "pad_token_id", None), num_embeddings(model.config, model)
    for name in ("bos_token_id", "eos_token_id"):
        token_id = getattr(text_config, name, None)
        if isinstance(token_id, int) and token_id != padding and 0 <= token_id < most:
            return token_id
    return 0


def num_embeddings(config: PretrainedConfig, model: PreTrainedModel | None = None) -> int:
    """How many ids a model has embeddings for: as its table says, else its config, which a resized one may not match.

    Args:
        config: Config of the model.
        model: The model, if it is loaded.
    """
    table = None if model is None else model.get_input_embeddings()
    table = table.get_base_layer() if isinstance(table, BaseTunerLayer) else table
    found = getattr(table, "num_embeddings", None)
    return int(config.get_text_config(decoder=True).vocab_size if found is None else found)


def commit_of(name: str, revision: str | None) -> str | None:
    """The Hub commit that a revision stands for; `None` for folders.

    Read from where the config is in the Hub cache: configs do not record their commit any more (transformers 5.23).
    """
    if Path(name).is_dir():
        return None
    commit: str | None = extract_commit_hash(cached_file(name, CONFIG_NAME, revision=revision), None)
    return commit


def is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has special tokens alone.

    For some architectures (Qwen2, GPT-2) transformers 5 makes one where the folder holds no tokenizer at all.
    """
    return len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens)


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """All that decides which ids a tokenizer makes of a text, and the other way round."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # not where a tokenizer is all Python
    if backend is None:
        words = [sorted(vocabulary.items()) for vocabulary in (tokenizer.get_vocab(), tokenizer.get_added_vocab())]
        return json.dumps([type(tokenizer).__name__, *words]).encode()
    # Truncation and padding, which are the last call's, stand before it (tokenizers 0.23); a parser takes a second.
    return str(backend.to_str()).rpartition('"added_tokens":[')[2].encode()


def unwrapped(name: str) -> str:
    """A module's or weight's name without what `torch.compile` and FSDP1 add to it, which stands in no file."""
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


def is_whole(weight: Tensor) -> bool:
    """Whether a weight's values are here: not a shard (FSDP2, ZeRO-3) and not offloaded by accelerate."""
    # FSDP2 leaves a DTensor in a weight's place, DeepSpeed 0.19 an empty tensor, accelerate 1.15 one on meta.
    return not hasattr(weight, "full_tensor") and weight.numel() > 0 and weight.device.type != "meta"


def full_shape(weight: Tensor) -> torch.Size:
    """Shape of a weight, also where DeepSpeed's ZeRO-3 has left an empty tensor in its place (0.19)."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def is_partitioned(model: nn.Module) -> bool:
    """Whether a model's weights are partitioned by DeepSpeed's ZeRO-3 and no engine gathers them when it runs (0.19).

    An engine gathers with hooks on every module that has weights.
    """
    return any(
        hasattr(weight, "ds_shape") and weight.numel() == 0 and not module._forward_pre_hooks
        for module in model.modules()
        for weight in module.parameters(recurse=False)
    )


def device_map_of(model: nn.Module) -> dict[str, Any]:
    """Where accelerate has put a model's modules, to be read and written; empty where it has not."""
    found: dict[str, Any] = getattr(model, "hf_device_map", {})
    return found


def uncompiled(function: _F) -> _F:
    """Have compilers run a function as it is: `torch.compiler.disable`, which alone takes longer than a short hook.

    Args:
        function: Runs by every pass, so that it must cost nothing where nothing is compiled.
    """
    disabled = torch.compiler.disable(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # what a compiler sees of this
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(_F, run)


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Make or load a model whole in every process, whatever engine the base is to be trained with.

    Transformers partitions every model that it makes while DeepSpeed's ZeRO-3 is on, and while accelerate loads for
    FSDP in little memory, it (before 5.23) fills the weights of all processes but the first with nothing. The engine
    puts both right in the models that it wraps.
    """
    # Private in transformers 5.23: the public setters take the object that only this weak reference knows.
    config, setting = deepspeed._hf_deepspeed_config_weak_ref, os.environ.get(_FSDP_LOADING)
    deepspeed.unset_hf_deepspeed_config()
    if setting is not None:
        os.environ[_FSDP_LOADING] = "false"
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config
        if setting is not None:
            os.environ[_FSDP_LOADING] = setting


def attached_configs(model: nn.Module) -> dict[str, PeftConfig]:
    """Configs of the adapters that a model carries, by name.

    PEFT and transformers keep them in this attribute of the base, which plain bases do not have (peft 0.21). The dict
    is the model's own: BaseTuner writes new adapters into it.
    """
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", {})
    return configs


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a model's forward names an argument."""
    return name in inspect.signature(function).parameters


def takes_positions(model: nn.Module) -> bool:
    """Whether a model wants to be told the positions of padded rows.

    RoBERTa and its kin do not: they count from their padding id on and leave padding out by themselves. Their table of
    positions is the only kind with a padding index (transformers 5.23).
    """
    counts_itself = any(
        isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in name
        for name, module in model.named_modules()
    )
    return accepts(type(model).forward, "position_ids") and not counts_itself


def argument_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the forward's arguments in order, so that positional ones can be told apart."""
    return tuple(inspect.signature(type(model).forward).parameters)[1:]


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


def counts_tokens(cache: Any) -> bool:
    """Whether a cache knows how many tokens it holds; one of linear attention or state-space layers alone does not."""
    return _counted(cache) is not None


def _counted(cache: Any) -> int | None:
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # it has no such method, or no layer that counts (transformers 5.23)
        return None
