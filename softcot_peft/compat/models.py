"""Differences between models: types, sizes, position ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .engines import full_shape

_MAX_WIDTH = 2**16  # hidden size, several times that of the widest published LM


def check_decoder_lm(config: PretrainedConfig, what: str, remedy: str, model: nn.Module | None = None) -> None:
    """Reject a model that is not a decoder language model.

    Args:
        config: Config of the model.
        what: Subject of the error message.
        remedy: Advice at the end of the error message.
        model: The model, if it is loaded. Its class may be a causal LM even if the type of its config is not mapped.

    Raises:
        ValueError: The model is an encoder-decoder, an encoder, or not a language model.
    """
    text_config = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        kind = "an encoder-decoder"
    elif not _is_causal_lm(config, text_config, model):
        kind = "no causal LM known to transformers"
    elif _is_bidirectional(text_config):
        kind = "an encoder: its config lets tokens attend to later ones"
    elif model is not None and accepts(type(model).forward, "shared_kv_states"):  # Gemma 4 (5.23)
        kind = "a draft model that reads another one's keys and values"
    else:
        return
    raise ValueError(f"{what} must be a decoder LM, but its type {config.model_type!r} is {kind}. {remedy}")


def _is_causal_lm(config: PretrainedConfig, text_config: PretrainedConfig, model: nn.Module | None) -> bool:
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) in mapping or type(text_config) in mapping:
        return True
    return model is not None and type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _is_bidirectional(config: PretrainedConfig) -> bool:
    """Return whether a config makes a model bidirectional (fields of transformers 5.23)."""
    # BERT and related models are encoders by default. GPT-NeoX has `is_decoder` too, but ignores it.
    if hasattr(config, "is_decoder") and hasattr(config, "add_cross_attention"):
        return not config.is_decoder
    return (
        getattr(config, "causal", True) is False  # XLM
        or getattr(config, "attn_type", None) == "bi"  # XLNet
        or getattr(config, "use_bidirectional_attention", None) in (True, "all")  # Gemma and related models
    )


def head_width(model: PreTrainedModel) -> int:
    """Return the width of a causal LM's last hidden states, the input of its head.

    It may differ from `config.hidden_size`: OPT-350M projects to another width before its head.

    Raises:
        ValueError: The model has no head, or its width is implausible.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"The assistant must be a causal LM with its head, got {type(model).__name__}. Load it with "
            "`AutoModelForCausalLM`."
        )
    width = int(getattr(head, "in_features", None) or head.weight.shape[-1])
    if width > _MAX_WIDTH:
        raise ValueError(
            f"The assistant's hidden states must be at most {_MAX_WIDTH} wide, got {width}. No LM is wider."
        )
    return width


def states_width(model: PreTrainedModel) -> int:
    """Width of the last hidden states of a causal LM's backbone.

    Some heads reduce it first (ELECTRA, RoFormer, RemBERT), and `config.hidden_size` is not it everywhere (OPT-350M).
    Where the two differ, the backbone runs on one token.
    """
    width = head_width(model)
    if width == getattr(model.config.get_text_config(decoder=True), "hidden_size", None):
        return width
    backbone = backbone_of(model)
    if backbone.device.type == "meta":
        return width
    with torch.no_grad():
        ids = torch.full((1, 1), ordinary_token(model), device=backbone.device)
        states: Tensor = backbone.forward(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
    return int(states.shape[-1])


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return a causal LM without its head.

    `base_model` returns the whole model if `base_model_prefix` is not the name of the backbone (Llama4ForCausalLM,
    transformers 5.23). In this case, the backbone is the transformers model among the children.

    Raises:
        ValueError: The model has no separate backbone.
    """
    for found in (model.base_model, *model.children()):
        if found is not model and isinstance(found, PreTrainedModel):
            return found
    raise ValueError(
        f"The assistant must be a causal LM with a backbone of its own, got {type(model).__name__}. Choose another "
        "assistant."
    )


def embedding_width(table: nn.Module) -> int:
    """Return the width of an embedding; packed weights (GGUF, 4-bit) have another one."""
    width = getattr(table, "embedding_dim", None)
    return width if isinstance(width, int) else int(full_shape(table.weight)[-1])  # type: ignore[arg-type]


def is_table(module: nn.Module) -> bool:
    """Return whether a module is a single embedding table; models with several codebooks have a list of tables."""
    return isinstance(getattr(module, "weight", None), Tensor)


def num_embeddings(config: PretrainedConfig, model: PreTrainedModel | None = None) -> int:
    """Return the number of ids with an embedding: from the table, else from the config, which resizing may outdate.

    Args:
        config: Config of the model.
        model: The model, if it is loaded.
    """
    table = None if model is None else model.get_input_embeddings()
    table = table.get_base_layer() if isinstance(table, BaseTunerLayer) else table
    found = getattr(table, "num_embeddings", None)
    return int(config.get_text_config(decoder=True).vocab_size if found is None else found)


def ordinary_token(model: PreTrainedModel) -> int:
    """Return an id that has an embedding and is not padding: BOS or EOS, else 0.

    Configs of some types lack these fields, and models with a reduced vocabulary may keep the ids of the full one
    (transformers 5.23).
    """
    text_config = model.config.get_text_config(decoder=True)
    padding, most = getattr(text_config, "pad_token_id", None), num_embeddings(model.config, model)
    for name in ("bos_token_id", "eos_token_id"):
        token_id = getattr(text_config, name, None)
        if isinstance(token_id, int) and token_id != padding and 0 <= token_id < most:
            return token_id
    return 0


def position_limit(config: PretrainedConfig) -> int | None:
    """Return the maximum number of positions; `None` if there is no limit.

    Rotary embeddings, which transformers 5 describes in `rope_parameters`, extend beyond `max_position_embeddings`.
    For learned positions, it is the length of the table.
    """
    text_config = config.get_text_config(decoder=True)
    if getattr(text_config, "rope_parameters", None):
        return None
    limit = getattr(text_config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def rotary_switch(config: PretrainedConfig) -> int | None:
    """Return the sequence length beyond which the rotary frequencies of a pass change; `None` if they never do.

    The largest position of a pass selects the frequencies for all of its tokens (fields of transformers 5.23; one
    dict, or one per layer type).
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
    """Return whether gradient checkpointing is on, with which a model keeps no cache.

    Reads the flag of the modules, since the model's attribute was renamed (transformers 5.23).
    """
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function has an argument of this name."""
    return name in inspect.signature(function).parameters


def takes_positions(model: nn.Module) -> bool:
    """Return whether a model needs `position_ids` for padded rows.

    RoBERTa and related models do not: they count positions from the padding id on and skip padding themselves. They
    are the only models whose position table has a padding index (transformers 5.23).
    """
    counts_itself = any(
        isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in name
        for name, module in model.named_modules()
    )
    return accepts(type(model).forward, "position_ids") and not counts_itself


def argument_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of `forward` in order, to identify positional arguments."""
    return tuple(inspect.signature(type(model).forward).parameters)[1:]
