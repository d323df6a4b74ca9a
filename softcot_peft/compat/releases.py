"""Differences between releases of transformers and PEFT, each with the release that has it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

# Arguments that mark packed and padding-free batches for attention kernels (transformers 5.23).
PACKED_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "block_table")


def attached_configs(model: nn.Module) -> dict[str, PeftConfig]:
    """Return the configs of a model's adapters, by name.

    PEFT and transformers store them in this attribute of the base, which a base without adapters lacks (peft 0.21).
    This is the model's own dict, to which BaseTuner adds new adapters.
    """
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", {})
    return configs


def commit_of(name: str, revision: str | None) -> str | None:
    """Return the Hub commit of a revision; `None` for folders.

    Takes it from the config's path in the Hub cache, since configs no longer store their commit (transformers 5.23).
    """
    if Path(name).is_dir():
        return None
    commit: str | None = extract_commit_hash(cached_file(name, CONFIG_NAME, revision=revision), None)
    return commit


def is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer has only special tokens.

    For some architectures (Qwen2, GPT-2), transformers 5 creates one if a folder has no tokenizer files.
    """
    return len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens)


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Return everything that determines how a tokenizer encodes and decodes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # pure Python tokenizers have none
    if backend is None:
        words = [sorted(vocabulary.items()) for vocabulary in (tokenizer.get_vocab(), tokenizer.get_added_vocab())]
        return json.dumps([type(tokenizer).__name__, *words]).encode()
    # Drops truncation and padding of the last call, which come first (tokenizers 0.23). Parsing would take a second.
    return str(backend.to_str()).rpartition('"added_tokens":[')[2].encode()


@torch.no_grad()
def fill_buffers(model: PreTrainedModel, module: nn.Module, device: torch.device) -> None:
    """Give the buffers of a module on the meta device the values that no file has, such as an embedding's scale.

    `_init_weights` is private in transformers, but the only method that makes them (5.23). It is called while the
    weights are on the meta device, and does nothing to them.
    """
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty_like(buffer, device=device))
        model._init_weights(part)
