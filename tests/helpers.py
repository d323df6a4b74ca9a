"""The only place where the tests reach into the package: when its internals are renamed, only this file follows.

Importing it loads no model and needs no pytest, so that scripts can use it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softcot_peft.checkpoint.local_names import is_local, public_name
from softcot_peft.compat.caches import CACHE_NAME, cache_length, find_cache
from softcot_peft.compat.engines import is_whole, loaded_whole
from softcot_peft.compat.eval_mode import evaluating
from softcot_peft.compat.models import rotary_switch
from softcot_peft.compat.releases import tokenizer_state
from softcot_peft.passes import head_loss, two_pass
from softcot_peft.passes.generation import Generation
from softcot_peft.passes.shared_prompt import PromptSharing
from softcot_peft.precompute.lookup import prompt_keys
from softcot_peft.rows.columns import insert, insert_positions, restore, restore_keys, take
from softcot_peft.rows.locate import locate
from softcot_peft.rows.placement import Placement, align_left, positions, prompts, trailing
from softcot_peft.serving.batches import Batches
from softcot_peft.serving.refuse_embeds import RefuseEmbeds, has_embeds
from softcot_peft.serving.settings import read_adapters, read_device
from softcot_peft.serving.vllm.check import check_environment
from softcot_peft.serving.vllm.check_fit import check_outputs
from softcot_peft.serving.vllm.inputs import find_tokens, with_thoughts, without_thoughts
from softcot_peft.sources import ThoughtSource
from softcot_peft.sources import find_assistant as _finding
from softcot_peft.sources import tokenizers as _tokenizers
from softcot_peft.sources.find_assistant import find_assistant
from softcot_peft.sources.frozen_lm import FrozenLM as Assistant
from softcot_peft.sources.marker import find_marker
from softcot_peft.sources.prompt_reader import PromptReader

if TYPE_CHECKING:
    import pytest

__all__ = [  # private names that tests use under these names
    "CACHE_NAME",
    "Assistant",
    "Batches",
    "Placement",
    "PromptReader",
    "RefuseEmbeds",
    "align_left",
    "cache_length",
    "check_environment",
    "check_outputs",
    "evaluating",
    "find_assistant",
    "find_cache",
    "find_marker",
    "find_tokens",
    "has_embeds",
    "head_loss",
    "insert",
    "insert_positions",
    "is_local",
    "is_whole",
    "loaded_whole",
    "locate",
    "positions",
    "prompt_keys",
    "prompts",
    "public_name",
    "read_adapters",
    "read_device",
    "restore",
    "restore_keys",
    "rotary_switch",
    "take",
    "tokenizer_state",
    "trailing",
    "with_thoughts",
    "without_thoughts",
]

# Where the package's objects are

OWN_MODULES = {"SoftCoTLayer", "LinearProjection", "ModuleDict"}  # what an adapter adds to a base
PROJECTION = "softcot_projection"  # what projections are called within the wrapped embedding, and in files


def key_of(part: str, adapter: str = "default") -> str:
    """The name of a projection's weight or bias within the wrapped embedding."""
    return f"{PROJECTION}.{adapter}.{part}"


def softcot_layer(model: nn.Module) -> Any:
    """The wrapped embedding of a base or of a PeftModel."""
    return next(module for module in model.modules() if hasattr(module, "softcot_source"))


def hooks_of(model: nn.Module) -> Any:
    """What carries the forward hooks of a base or of a PeftModel."""
    return next(module.softcot_hooks for module in model.modules() if "softcot_hooks" in vars(module))


def sources_of(model: nn.Module) -> dict[str, ThoughtSource]:
    """The thought source of every adapter, by name."""
    return softcot_layer(model).softcot_source


def source_of(model: nn.Module, adapter: str | None = "default") -> ThoughtSource:
    """The thought source of an adapter; `None` for the active one."""
    return softcot_layer(model).active_source() if adapter is None else sources_of(model)[adapter]


def readers_of(model: nn.Module) -> dict[str, PromptReader]:
    """What makes the assistant's input for every adapter, by name."""
    return {name: source.reader for name, source in sources_of(model).items()}


def reader_of(model: nn.Module, adapter: str | None = "default") -> PromptReader:
    """What makes the assistant's input for an adapter; `None` for the active one."""
    return source_of(model, adapter).reader


def projections_of(model: nn.Module) -> dict[str, nn.Module]:
    """The projection of every adapter, by name."""
    return {name: source.projection for name, source in sources_of(model).items()}


def projection_of(model: nn.Module, adapter: str = "default") -> Any:
    """The trained module of an adapter."""
    return projections_of(model)[adapter]


def assistant_of(model: nn.Module, adapter: str | None = "default") -> Assistant:
    """The assistant of an adapter; `None` for the active one."""
    return reader_of(model, adapter).assistant


def backbone_of(model: nn.Module, adapter: str | None = "default") -> PreTrainedModel:
    """The frozen model that an adapter's assistant runs on the CPU, without its head."""
    return assistant_of(model, adapter).backbone(torch.device("cpu"))


def head_is_last(model: nn.Module) -> bool | None:
    """Whether a trial found that the loss can be computed where the head would run."""
    return hooks_of(model).trial.head_is_last


@torch.no_grad()
def soft_thoughts(model: nn.Module, batch: dict[str, Tensor], chains: tuple[int, ...] = (0,)) -> Tensor:
    """The soft thoughts of a batch, `(B * C, N, H_base)`, by the active adapter."""
    host, source = hooks_of(model).host, source_of(model, None)
    states = host.read(batch["input_ids"], host.locate(batch, source), source, chains=chains)
    return softcot_layer(model).soft_thoughts(states).flatten(0, 1)


@torch.no_grad()
def next_states(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The source's states of a batch, `(B, N, H_source)`, by the active adapter."""
    host, source = hooks_of(model).host, source_of(model, None)
    return host.read(batch["input_ids"], host.locate(batch, source), source).flatten(0, 1)


# What the package remembers between models


def given_assistants() -> dict[str, Any]:
    """What `use_assistant` was given, by name."""
    return _finding._preloaded


def given_tokenizers() -> dict[str, Any]:
    """What `use_tokenizer` was given, by name."""
    return _tokenizers._tokenizers


def loaded_assistants() -> Any:
    """The assistants that adapters share."""
    return _finding._loaded


def forget_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, no assistant and no tokenizer has been given; the fixture `nothing_given` calls this."""
    monkeypatch.setattr(_finding, "_preloaded", {})
    monkeypatch.setattr(_tokenizers, "_tokenizers", {})


# What an assistant holds


def is_loaded(assistant: Assistant) -> bool:
    """Whether any of its weights are in memory."""
    return bool(assistant._loaded)


def users_of(assistant: Assistant) -> Any:
    """The wrapped embeddings that asked an assistant to read."""
    return assistant._users


def backbone_for(assistant: Assistant, device: torch.device, user: Any) -> Any:
    """What runs for a user whose base is on a device."""
    return assistant._backbone(device, user)


# The package changed for a test


def break_assistants(monkeypatch: pytest.MonkeyPatch, error: BaseException, loading: bool = False) -> None:
    """Whatever assistant reads raises an error; with `loading`, so does one whose weights are loaded."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(Assistant, "hidden_states", fail)
    if loading:
        monkeypatch.setattr(Assistant, "_load", fail)


def watch_loading(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Where the weights of assistants are loaded to from here on."""
    devices: list[torch.device] = []
    original = Assistant._load
    monkeypatch.setattr(Assistant, "_load", lambda self, where: devices.append(where) or original(self, where))
    return devices


def wrap_encoding(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put something around what calls the assistant's tokenizer."""
    monkeypatch.setattr(PromptReader, "_encode", wrap(PromptReader._encode))


def never_share_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of one prompt are prefilled one by one."""
    monkeypatch.setattr(Generation, "shares", lambda self, inputs, cache: False)


def never_share_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that is its own source reads prompts apart from the real pass."""
    monkeypatch.setattr(PromptSharing, "allows", lambda self, *args: False)
    monkeypatch.setattr(two_pass, "shares_prompts", lambda *args: False)


def limit_parameters(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """The config of an assistant may ask for that many tensors."""
    monkeypatch.setattr("softcot_peft.checkpoint.untrusted._MOST_PARAMETERS", most)


# What the assistant does


def rows_read(backbone: nn.Module, output: Any) -> int:
    """The batch size of an assistant's pass."""
    return output.last_hidden_state.shape[0]


def in_training(backbone: nn.Module, output: Any) -> bool:
    """Whether a part of the assistant is in training mode in a pass, or the pass has a gradient."""
    return any(part.training for part in backbone.modules()) or output[0].requires_grad


@contextmanager
def assistant_passes(
    model: nn.Module, see: Callable[[nn.Module, Any], Any] = rows_read, adapter: str | None = "default"
) -> Iterator[list[Any]]:
    """Collects what `see(backbone, output)` returns for every pass of an adapter's assistant."""
    passes: list[Any] = []
    backbone = backbone_of(model, adapter)
    handle = backbone.register_forward_hook(lambda module, args, output: passes.append(see(module, output)))
    try:
        yield passes
    finally:
        handle.remove()


@contextmanager
def recorded_thoughts(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the soft thoughts of every pass."""
    thoughts: list[Tensor] = []
    handle = projection_of(model).register_forward_hook(lambda *args: thoughts.append(args[2].detach()))
    try:
        yield thoughts
    finally:
        handle.remove()


@contextmanager
def assistant_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Collects the shape of each input that any assistant reads."""
    shapes: list[tuple[int, ...]] = []
    original = Assistant.hidden_states

    def read(self: Assistant, ids: Tensor, *others: Any) -> Tensor:
        shapes.append(tuple(ids.shape))
        return original(self, ids, *others)

    with monkeypatch.context() as patch:
        patch.setattr(Assistant, "hidden_states", read)
        yield shapes
