"""Differences between releases of transformers and PEFT, each with the release it was seen in."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

# Arguments with which packed and padding-free batches announce themselves to attention kernels (transformers 5.23).
PACKED_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx", "block_table")


def attached_configs(model: nn.Module) -> dict[str, PeftConfig]:
    """Configs of the adapters that a model carries, by name.

    PEFT and transformers keep them in this attribute of the base, which plain bases do not have (peft 0.21). The dict
    is the model's own: BaseTuner writes new adapters into it.
    """
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", {})
    return configs


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
