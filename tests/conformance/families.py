"""A tiny model of any type in transformers' causal-LM mapping, made from its config alone."""

from __future__ import annotations

import itertools
import re
import sys
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB = 64
WORDS = range(3, 44)  # ids of prompts; below are pad, bos and the like, above those of images and sounds

# Sizes by the names that configs give them; the first pattern that matches a whole name counts. `None` leaves a field
# to what the config's class makes of the others.
SIZES: tuple[tuple[str, int | None], ...] = (
    (r"(chunk_size_feed_forward|prompt_length|num_codebooks|num_channels|in_channels|out_channels)", None),
    (r"(qk_head_dim|audio_channels|time_step_rank|mamba_dt_rank)", None),
    (r".*vocab_size.*|encoder_hash_byte_group_vocab", VOCAB),
    (r"(hidden_size_per_layer_input|laurel_rank)", 8),
    (r"(hidden_size|d_model|n_embd|emb_dim|embedding_dim|dim_model|lru_width|backbone_hidden_size)", 32),
    (r"(word_embed_proj_dim|embedding_size|input_embedding_size|output_embedding_size|embed_dim)", 24),
    (r"attention_hidden_size|hidden_size_global", 32),
    (r"(moe|expert|shared|dense).*(intermediate|ffn).*size", 24),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|feed_forward_size|mlp_dim)|d_inner|dff|dim_ff", 48),
    (r"swa_head_dim|index_head_dim", 8),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", 4),
    (r"(.*v_head_dim|head_dim|.*_head_dim|dim_head|d_head|kv_channels|attention_head_size|mamba_d_head)", 8),
    (r"(q|kv|o)_lora_rank|hc_lowrank|adapter_rank|gated_norm_rank|d_rel", 8),
    (r"num_shared_experts|n_shared_experts|moe_num_shared_experts", 1),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group|first_k_dense_replace|num_dense_layers", 1),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num)", 4),
    (r"(num_key_value_heads|num_kv_heads|.*_num_key_value_heads|kv_n_heads|num_query_groups)", 2),
    (r"(.*attention_heads|n_heads?|num_heads|index_n_heads|linear_num_(key|value)_heads|linear_num_heads)", 4),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length|rel_extent)", 128),
    (r"max_(source|target)_positions|original_max_position_embeddings", 128),
    (r"(sliding_window|sliding_window_size|attention_window_size|window_size|local_attention)", 8),
    (r"attention_chunk_size|local_attention_window_len|keep_window_size|chunk_size|mamba_chunk_size", 8),
    (r"(state_size|mamba_d_state|ssm_state_size)", 8),
    (r"index_topk|index_topk_blocks", 4),
    (r"index_block_size", 4),
    (r"image_size", 8),
    (r"patch_size", 4),
)
LAYERS = r"num_hidden_layers|n_layers?|num_layers|depth|num_blocks|.*(encoder|decoder)_layers|num_global_layers"
# Lists with one entry per layer, of kinds of layers; every kind is kept once.
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "indexer_types", "attn_layers")

# The part of a draft model that is a language model: it has no keys and values of its own.
DRAFT: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
# Types whose own vision model needs a package that is no dependency here (timm), and one that stands in for it.
TOWERS = {"gemma3n": "siglip_vision_model"}
DRAFTS = ("gemma4_assistant", "gemma4_unified_assistant")
ENCODER_DECODERS = frozenset(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
STATES = "Mamba|Rwkv|xLSTM|Rglru|BambaMixer|FalconH1Mixer"
SCALES = ("embedding_multiplier", "scale_emb", "scale_embedding", "embed_scale", "normalize_embedding")

# Types that cannot be built from their own config, and how transformers says so (5.24).
UNBUILDABLE = {
    "musicgen": "has no attribute 'dropout'",  # the class wants the config of the decoder inside
    "musicgen_melody": "has no attribute 'dropout'",
}
# Types that are no decoder LMs, and how the package says so when an adapter is attached.
REFUSED = {"xlm": "attend to later ones", "xlnet": "attend to later ones"}
# Draft models, which can be built since transformers 5.24; before, all of their layers shared.
if Version(transformers.__version__) >= Version("5.24"):
    REFUSED |= dict.fromkeys(DRAFTS, "is a draft model")
else:
    UNBUILDABLE |= dict.fromkeys(DRAFTS, "The set of layer types producing a cache is different")
# Types whose embedding is not given the ids of the call, and how the package says so in the first pass: CPM-Ant puts a
# prompt of its own before them, Reformer pads them to its chunks.
UNCARRIED = dict.fromkeys(("cpmant", "reformer"), "must write the thoughts, but was not run")

# Fields that names alone do not settle, by the type of the config that has them; a dict is for a sub-config.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "blt": {"num_hidden_layers": 2},  # its class has no such field, and caches ask for it
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        }
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dory": {
        "initializer_range": 0.3,  # that of the weights in `build`; scales are divided by it
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_assistant": {"text_config": DRAFT},
    "gemma4_unified_assistant": {"text_config": DRAFT},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 0,
        "num_buckets": 2,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
    },
}


def _kinds(config: PretrainedConfig) -> dict[str, list[str]]:
    """The lists of kinds of layers in a config, with each kind once."""
    found = {name: config.__dict__.get(name) for name in KINDS}
    return {name: list(dict.fromkeys(value)) for name, value in found.items() if value}


def shrink(config: PretrainedConfig, more: dict[str, Any] | None = None) -> PretrainedConfig:
    """A tiny config of the same class: every size by its name, in sub-configs too."""
    override = OVERRIDES.get(config.model_type, {}) | (more or {})
    kinds = _kinds(config)
    layers = override.get("num_hidden_layers") or max([2, *map(len, kinds.values())])
    changes: dict[str, Any] = {name: (value * layers)[:layers] for name, value in kinds.items()}
    special = itertools.count(WORDS.stop)
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            changes[name] = shrink(value, override.pop(name, None))
        elif re.fullmatch(r".*_token_(id|index)", name):
            known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
            changes[name] = known[name] if name in known else None if value is None else next(special)
        elif name == "head_dim" and value is None:
            changes[name] = 8
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif re.fullmatch(LAYERS, name):
            changes[name] = layers
        elif name == "head_dim" and hasattr(config, "qk_rope_head_dim"):
            continue  # made from it
        else:
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
            if size is not None and (value > size or name.endswith("vocab_size")):
                changes[name] = size
    heads = config.__dict__.get("num_attention_heads")
    if "num_key_value_heads" in changes and heads == config.__dict__["num_key_value_heads"]:
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    return type(config)(**(changes | override))


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """A tiny config of a type."""
    draft = OVERRIDES.get(model_type, {}).get("text_config") == DRAFT
    sub = {"text_config": {"model_type": f"{model_type.removesuffix('_assistant')}_text"} | DRAFT} if draft else {}
    config = shrink(CONFIG_MAPPING[model_type](**sub), changes)
    if model_type in TOWERS:
        tower = shrink(CONFIG_MAPPING[TOWERS[model_type]]())
        for name in ("vocab_size", "vocab_offset", "rms_norm_eps"):
            setattr(tower, name, getattr(config.vision_config, name))
        config.__dict__["vision_config"] = tower  # past its class's check of types
    return config


def is_switchable(model_type: str) -> bool:
    """Whether a type is an encoder that `is_decoder=True` makes a decoder."""
    fields = CONFIG_MAPPING[model_type].__dataclass_fields__
    return {"is_decoder", "add_cross_attention"} <= set(fields) and model_type not in ENCODER_DECODERS


def build(model_type: str, model_class: Any = AutoModelForCausalLM, **changes: Any) -> PreTrainedModel:
    """A tiny decoder with weights so large that greedy tokens depend on everything before them.

    Args:
        model_type: The type.
        model_class: The class with `from_config`.
        **changes: Of the config.
    """
    if is_switchable(model_type):
        changes = {"is_decoder": True} | changes
    torch.manual_seed(0)
    model = model_class.from_config(tiny_config(model_type, **changes), dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.3)
            else:  # some scales and gates begin at zero, which would silence what they belong to
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.generation_config = GenerationConfig(pad_token_id=0)  # greedy, and no end before the last token asked for
    return model.eval()


def _has(model: PreTrainedModel, pattern: str) -> bool:
    return any(re.search(pattern, type(module).__name__) for module in model.modules())


def traits(model: PreTrainedModel, model_type: str) -> list[str]:
    """What is particular about the model of a type, from its config and its modules."""
    config = model.config.get_text_config(decoder=True)
    fields, embedding = vars(config), model.get_input_embeddings()
    kinds = {kind for name in KINDS for kind in fields.get(name) or ()}
    names = dir(sys.modules[type(model).__module__])
    ids = torch.tensor([[5, 9, 30]])
    with torch.no_grad():
        scaled = not torch.equal(embedding(ids), embedding.weight[ids])
    scaled = scaled or any(fields.get(name, 1) not in (1, None, False) for name in SCALES)
    tables = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    tables = [name for name in tables if not re.search("vision|audio|image", name)]
    found = {
        "wrapper of a text model": type(config) is not type(model.config) or _has(model, "Vision|Audio"),
        "text model of a wrapper": not isinstance(model.config, CONFIG_MAPPING[model_type]),
        "encoder as decoder": is_switchable(model_type),
        "decoder of an encoder-decoder": CONFIG_MAPPING[model_type].is_encoder_decoder,
        "learned or fixed positions": any(re.search(r"pos|wpe", name) for name in tables),
        "rotary": bool(fields.get("rope_parameters")) or "rotary_dim" in fields or _has(model, "Rotary"),
        "ALiBi": any("alibi" in name for name in names) and fields.get("alibi", True) is not False,
        "sliding window": bool({"sliding_attention", "local", "chunked_attention"} & kinds)
        or (not kinds and bool(fields.get("sliding_window")) and fields.get("use_sliding_window", True)),
        "state space": _has(model, STATES),
        "linear attention or convolution": bool({"linear_attention", "conv"} & kinds) and not _has(model, STATES),
        "mixture of experts": _has(model, "Experts|MoE|Moe|TopkRouter|TopKGate"),
        "latent attention": bool(fields.get("kv_lora_rank")),
        "indexed attention": bool({"indexed_attention", "compressed_sparse_attention"} & kinds)
        or bool(fields.get("index_topk")),
        "per-layer embeddings": bool(fields.get("hidden_size_per_layer_input")) or bool(fields.get("ple_layer_ids")),
        "scaled embeddings": scaled,
        "tied head": model.get_output_embeddings().weight is embedding.weight,
    }
    return [name for name, holds in found.items() if holds]
