"""Differences between models: what kind they are, their sizes, their positions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_WIDEST = 2**16  # hidden states, several times those of the widest published LM


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
