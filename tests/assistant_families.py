"""Tiny causal LMs of many families, made from configs alone, to be assistants."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    FalconMambaConfig,
    FuyuConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3nTextConfig,
    GPT2Config,
    GPTNeoXConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    OlmoeConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    XGLMConfig,
    xLSTMConfig,
)

WIDTH = 24
_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 12,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
_STATE_SPACE = {"hidden_size": WIDTH, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.4}

# What is particular about each: the part of the contract it could break.
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES),  # rotary
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "gpt2": lambda: GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, n_positions=256, initializer_range=0.4),  # learned
    "opt": lambda: OPTConfig(  # learned, offset by two; the head reads another width
        hidden_size=WIDTH,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        init_std=0.4,
    ),
    "xglm": lambda: XGLMConfig(  # sinusoidal
        d_model=WIDTH, ffn_dim=32, num_layers=2, attention_heads=2, max_position_embeddings=256, init_std=0.4
    ),
    "bloom": lambda: BloomConfig(hidden_size=WIDTH, n_layer=2, n_head=2, initializer_range=0.4),  # ALiBi
    "mpt": lambda: MptConfig(d_model=WIDTH, n_heads=2, n_layers=2, expansion_ratio=2, max_seq_len=256),  # ALiBi
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, is_decoder=True),
    "openai_gpt": lambda: OpenAIGPTConfig(  # no last norm; its own backbone's output has no cache
        n_embd=WIDTH, n_layer=2, n_head=2, n_positions=256, initializer_range=0.4
    ),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=4),  # shorter than a prompt
    "gemma2": lambda: Gemma2Config(**_SIZES, head_dim=12, sliding_window=4),  # scaled embeddings, softcaps
    "gemma3n": lambda: Gemma3nTextConfig(  # per-layer inputs
        **_SIZES | {"num_hidden_layers": 4, "intermediate_size": [32] * 4},
        head_dim=12,
        sliding_window=4,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=200,
        num_kv_shared_layers=2,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma3": lambda: Gemma3Config(  # a wrapper with a vision tower
        text_config=_SIZES | {"head_dim": 12, "sliding_window": 4},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    ),
    "fuyu": lambda: FuyuConfig(**_SIZES, image_size=30, patch_size=30),  # a wrapper around another causal LM
    "mixtral": lambda: MixtralConfig(**_SIZES, **_MOE),
    "olmoe": lambda: OlmoeConfig(**_SIZES, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": lambda: DeepseekV3Config(  # latent attention, experts
        **_SIZES | {"num_key_value_heads": 2},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "falcon": lambda: FalconConfig(  # ALiBi or rotary by its config
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, alibi=True, initializer_range=0.4
    ),
    "mamba": lambda: MambaConfig(**_STATE_SPACE, time_step_rank=4),
    "mamba2": lambda: Mamba2Config(**_STATE_SPACE, num_heads=6, head_dim=8, n_groups=1, chunk_size=8),
    "falcon_mamba": lambda: FalconMambaConfig(**_STATE_SPACE, time_step_rank=4),
    "rwkv": lambda: RwkvConfig(hidden_size=WIDTH, attention_hidden_size=WIDTH, num_hidden_layers=2),
    "jamba": lambda: JambaConfig(  # state space, attention and experts
        **_SIZES,
        num_experts=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        use_mamba_kernels=False,
    ),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(
        **{key: value for key, value in _SIZES.items() if key not in ("initializer_range", "max_position_embeddings")}
        | {"num_hidden_layers": 3},
        lru_width=WIDTH,
        attention_window_size=4,
        block_types=("recurrent", "recurrent", "attention"),
    ),
    "qwen3_next": lambda: Qwen3NextConfig(  # linear attention and experts
        **_SIZES,
        **_LINEAR,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "bart": lambda: BartConfig(  # a decoder whose backbone takes no positions: it counts columns
        d_model=WIDTH,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_position_embeddings=256,
        init_std=0.4,
        is_decoder=True,
        is_encoder_decoder=False,
    ),
    "llama4": lambda: Llama4TextConfig(  # its `base_model` is itself
        **_SIZES, head_dim=12, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=8
    ),
    "xlstm": lambda: xLSTMConfig(  # its sizes are multiples of 64
        hidden_size=128, embedding_dim=128, num_hidden_layers=2, num_heads=2, chunk_size=8
    ),
    "lfm2": lambda: Lfm2Config(**_SIZES, layer_types=["conv", "full_attention"]),
    "qwen3_5": lambda: Qwen3_5TextConfig(**_SIZES, **_LINEAR),
}


def make_family(name: str, vocab_size: int) -> PreTrainedModel:
    """A tiny causal LM whose hidden states depend on everything before them."""
    config = FAMILIES[name]()
    config.get_text_config(decoder=True).vocab_size = vocab_size
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.1:  # families that ignore `initializer_range`
                parameter.normal_(std=0.4)
    return model.eval()
