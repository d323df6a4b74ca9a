"""Fingerprint of an assistant: what its hidden states depend on, besides the prompt and N. Loads no weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from ..compat.engines import is_whole
from ..compat.releases import tokenizer_state
from .fixed_date import DATE
from .frozen_lm import FrozenLM
from .prompt_reader import PromptReader

_SAMPLES = 64  # values per tensor


def fingerprint(reader: PromptReader) -> dict[str, Any]:
    """Return what the hidden states depend on: the assistant, and how its input is built.

    Values are numbers and strings, long ones as digests, and are the same in every process.
    """
    assistant, own = reader.assistant, reader.base_tokenizer
    return {
        **_changes_since_0_1_0(reader),
        "assistant": Path(assistant.name).name if _is_folder(assistant) else assistant.name,
        **_weights(assistant),
        "assistant_prompt": reader.config.assistant_prompt,
        "assistant_chat_template": None if reader.config.assistant_prompt is None else _template(assistant.tokenizer),
        "assistant_tokenizer": None if own is None else _digest([tokenizer_state(assistant.tokenizer)]),
        "base_tokenizer": None if own is None else _digest([tokenizer_state(own)]),
        "assistant_thought_token_id": reader.assistant_thought_token_id,
    }


def model_fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Return config, weights and dtype of a loaded model, without what adapters have added to it."""
    config = model.config.to_diff_dict()
    own = {name: config[name] for name in sorted(config) if name not in ("transformers_version", "_name_or_path")}
    return {
        "assistant_config": _digest([json.dumps(own, default=str).encode()]),
        "assistant_weights": _digest(_sample_model(model)),
        "assistant_dtype": str(model.dtype).removeprefix("torch."),
    }


def tensor_digest(tensor: Tensor) -> str:
    """Return a digest of all values of a tensor."""
    return _digest([tensor.detach().float().cpu().contiguous().numpy().tobytes()])


def _changes_since_0_1_0(reader: PromptReader) -> dict[str, Any]:
    """Return fields for inputs that are built differently than in 0.1.0, which did not write these fields."""
    template = None if reader.config.assistant_prompt is None else reader.assistant.tokenizer.chat_template
    found: dict[str, Any] = {}
    if getattr(reader.base_tokenizer, "clean_up_tokenization_spaces", False):
        found["clean_up_tokenization_spaces"] = False
    if "strftime_now" in str(template):
        found["assistant_date"] = DATE
    if reader.in_parts:
        found["assistant_content"] = "parts"
    for name in ("assistant_prefix", "assistant_prompt_between"):
        if getattr(reader.config, name) is not None:
            found[name] = getattr(reader.config, name)
    return found


def _is_folder(assistant: FrozenLM) -> bool:
    return assistant.preloaded_model is None and Path(assistant.name).is_dir()


def _weights(assistant: FrozenLM) -> dict[str, Any]:
    """Return commit, config, weights and dtype of an assistant. A Hub commit determines config and weights."""
    found: dict[str, Any] = dict.fromkeys(("assistant_commit", "assistant_config", "assistant_weights"))
    model = assistant.preloaded_model
    if model is not None:
        return found | model_fingerprint(model)
    if _is_folder(assistant):
        found["assistant_config"] = _digest([Path(assistant.name, CONFIG_NAME).read_bytes()])
        found["assistant_weights"] = _digest(_sample_files(Path(assistant.name)))
    else:
        found["assistant_commit"] = assistant.revision
    dtype = assistant.dtype if assistant.dtype == "auto" else str(getattr(torch, assistant.dtype))
    return found | {"assistant_dtype": dtype.removeprefix("torch.")}


def _sample_model(model: PreTrainedModel) -> Iterable[bytes]:
    """Yield a few values of each tensor of a model, but of what adapters of ours train within it.

    Training changes every tensor slightly.
    """
    for name, tensor in model.state_dict().items():
        if "softcot_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
        if is_whole(tensor):  # for sharded and offloaded tensors, only the shape is used
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].cpu().contiguous()
            yield sample.view(torch.uint8).numpy().tobytes()


def _sample_files(folder: Path) -> Iterable[bytes]:
    """Like `_sample_model`, for a folder of safetensors files: headers, and bytes from the middle of each tensor."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(min(size, path.stat().st_size))
            yield path.name.encode()
            yield header
            for name, tensor in sorted(json.loads(header).items()):
                if name != "__metadata__":
                    first, end = tensor["data_offsets"]
                    file.seek(8 + size + (first + end) // 2)
                    yield file.read(min(4 * _SAMPLES, end - (first + end) // 2))


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return None if template is None else _digest([json.dumps(template).encode()])


def _digest(parts: Iterable[bytes]) -> str:
    """Return a short hash of the parts."""
    found = sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()[:16]
