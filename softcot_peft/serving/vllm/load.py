"""Loads adapters for an engine: embedding matrix, assistant and projection, without the base's layers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers.utils.hub import cached_file

from ...attached import layer_of
from ..batches import Embed
from ..embedder import Embedder
from .inputs import Embedded, find_tokens


@dataclass(frozen=True)
class Loaded:
    """What an adapter needs beside the engine."""

    embed: Embed[Embedded]
    embeddings: Any  # the base's input embedding
    chat_template: str | None  # saved with the adapter, such as that of `with_thought_tokens`; `None`: the base's


def load_adapters(paths: Mapping[str, str], model_config: Any, device: str) -> dict[str, Loaded]:
    """Load adapters, by name. They share the embedding matrix and assistants.

    Args:
        paths: Hub ids or folders of adapters, by name.
        model_config: vLLM's config of the base.
        device: Where assistants and projections run.

    Raises:
        ValueError: An adapter does not fit the base.
    """
    base, found = _base(model_config), {}
    for name, path in paths.items():
        try:
            embedder = Embedder.from_pretrained(path, base=base, dtype=model_config.dtype, device=device)
            _check_chains(embedder)
            _load_assistant(embedder)
        except Exception as error:  # the files are a stranger's
            raise ValueError(f"The adapter {name!r} ({path}) cannot be served with this base: {error}") from error
        found[name] = Loaded(_embed(embedder), layer_of(embedder.model).base_layer, _chat_template(path))
    return found


def _chat_template(path: str) -> str | None:
    """Return the chat template in an adapter's folder, if any."""
    file = cached_file(
        path,
        "chat_template.jinja",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if file is None else Path(file).read_text(encoding="utf-8")


def _base(model_config: Any) -> str:
    """Return the folder or Hub id of the base; of a revision, the folder that vLLM has loaded it from."""
    name: str = model_config.model
    if model_config.revision is None or os.path.isdir(name):
        return name
    return snapshot_download(name, revision=model_config.revision, local_files_only=True)


def _check_chains(embedder: Embedder) -> None:
    if (chains := embedder.config.num_chains) > 1:
        raise ValueError(
            f"`num_chains` must be 1 to be served, got {chains}: a request has one answer, not one for each chain. "
            "Use `generate`, or feed the engine with `Embedder`, whose `chains` selects some."
        )


def _load_assistant(embedder: Embedder) -> None:
    """Load the assistant's weights, so that what is wrong with them stops the start, not the first request."""
    layer = layer_of(embedder.model)
    assistant = getattr(layer.active_source(), "assistant", None)
    if assistant is not None:
        assistant.backbone(layer.weight.device)


def _embed(embedder: Embedder) -> Embed[Embedded]:
    embeddings: Any = layer_of(embedder.model).base_layer

    def tokens(row: Sequence[int]) -> Tensor:
        found: Tensor = embeddings(torch.tensor([row], device=embeddings.weight.device))
        return found[0]

    @torch.no_grad()
    def embed(rows: Sequence[Sequence[int]]) -> list[Embedded]:
        width = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        found = embedder(ids, mask)
        return [find_tokens(embeds, tokens(row)) for embeds, row in zip(found, rows, strict=True)]

    return embed
