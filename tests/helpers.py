"""What several test files share.

The first part is the only place where the tests reach into the package: when its internals are renamed, only this part
follows. Importing it loads no model and needs no pytest, so that scripts can use it, too.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Trainer

from softcot_peft.compat.caches import CACHE_NAME, cache_length, find_cache
from softcot_peft.compat.engines import is_whole, loaded_whole
from softcot_peft.compat.eval_mode import evaluating
from softcot_peft.compat.models import rotary_switch
from softcot_peft.compat.releases import tokenizer_state
from softcot_peft.passes.generation import Generation
from softcot_peft.precompute.lookup import prompt_keys
from softcot_peft.rows.columns import insert, insert_positions, restore, restore_keys, take
from softcot_peft.rows.locate import locate
from softcot_peft.rows.placement import Placement, align_left, positions, prompts, trailing
from softcot_peft.sources import ThoughtSource
from softcot_peft.sources import find_assistant as _finding
from softcot_peft.sources import tokenizers as _tokenizers
from softcot_peft.sources.find_assistant import find_assistant
from softcot_peft.sources.frozen_lm import FrozenLM as Assistant
from softcot_peft.sources.prompt_reader import PromptReader

if TYPE_CHECKING:
    import pytest
    from tiny_pair import Pair

__all__ = [  # private names that tests use under these names
    "CACHE_NAME",
    "Assistant",
    "Placement",
    "PromptReader",
    "align_left",
    "cache_length",
    "evaluating",
    "find_assistant",
    "find_cache",
    "insert",
    "insert_positions",
    "is_whole",
    "loaded_whole",
    "locate",
    "positions",
    "prompt_keys",
    "prompts",
    "restore",
    "restore_keys",
    "rotary_switch",
    "take",
    "tokenizer_state",
    "trailing",
]

# Where the package's objects are

PROJECTION = "softcot_projection"  # what the projection is called in files
SOURCE = "softcot_source"  # what the thought sources are called within the wrapped embedding


def key_of(part: str, adapter: str = "default") -> str:
    """The name of a projection's weight or bias within the wrapped embedding."""
    return f"{SOURCE}.{adapter}.projection.{part}"


def softcot_layer(model: nn.Module) -> Any:
    """The wrapped embedding of a base or of a PeftModel."""
    return next(module for module in model.modules() if hasattr(module, "softcot_source"))


def hooks_of(model: nn.Module) -> Any:
    """What carries the forward hooks of a base or of a PeftModel."""
    return next(module.softcot_hooks for module in model.modules() if "softcot_hooks" in vars(module))


def sources_of(model: nn.Module) -> nn.ModuleDict:
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
def soft_thoughts(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The soft thoughts of a batch, `(B, N, H_base)`, by the active adapter."""
    host, source = hooks_of(model).host, source_of(model, None)
    states = host.read(batch["input_ids"], host.locate(batch, source), source)
    return softcot_layer(model).soft_thoughts(states).flatten(0, 1)


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


# Here ends what knows the package's internals. What the base does:


@contextmanager
def base_passes(model: nn.Module) -> Iterator[list[int]]:
    """Collects how many rows each run of a Llama's first layer has, with an adapter or without."""
    rows: list[int] = []
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    handle = base.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        handle.remove()


# Rows and batches

IGNORED = -100


def responses_of(pair: Pair, answers: Sequence[str]) -> list[list[int]]:
    """Answers as ids, each with an EOS."""
    return pair.rows([answer + "<eos>" for answer in answers])


def labelled(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], between: Sequence[int] = ()
) -> list[dict[str, list[int]]]:
    """Rows with labels on their responses; `between` stands between prompt and response."""
    rows = [([*prompt, *between], response) for prompt, response in zip(prompts, responses, strict=True)]
    return [
        {"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response} for prompt, response in rows
    ]


def collate(rows: Sequence[dict[str, list[int]]], side: str = "right") -> dict[str, Tensor]:
    """Labelled rows as a batch, padded on a side."""
    fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    rows = [{"attention_mask": [1] * len(row["input_ids"])} | row for row in rows]
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], True, fill, side) for name, fill in fills.items()
    }


def last_labels(ids: Tensor, count: int) -> Tensor:
    """Labels on the last tokens of every row."""
    labels = torch.full_like(ids, IGNORED)
    labels[:, -count:] = ids[:, -count:]
    return labels


# What a model says


def up_to_eos(rows: Sequence[list[int]], eos: int = 1, pad: int = 0) -> list[list[int]]:
    """Each row up to and with its first EOS; nothing but padding may follow it."""
    ends = [row.index(eos) + 1 if eos in row else len(row) for row in rows]
    assert all(set(row[end:]) <= {pad} for row, end in zip(rows, ends, strict=True))
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def after_prompts(output: Tensor, batch: dict[str, Tensor]) -> list[list[int]]:
    """What `generate` returned after the prompts of a batch, which must be the caller's."""
    length = batch["input_ids"].shape[1]
    copies = output.shape[0] // batch["input_ids"].shape[0]
    assert torch.equal(output[:, :length], batch["input_ids"].repeat_interleave(copies, 0))
    return output[:, length:].tolist()


def new_tokens(output: Tensor, batch: dict[str, Tensor]) -> list[list[int]]:
    """The same, each row up to and with its EOS."""
    return up_to_eos(after_prompts(output, batch))


def generated(model: nn.Module, batch: dict[str, Tensor], new: int, **options: Any) -> list[list[int]]:
    """New tokens of a batch, each row up to and with its EOS; with `min_new_tokens`, exactly as many."""
    return new_tokens(model.generate(**batch, max_new_tokens=new, **options), batch)


def next_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the token after each row of a batch, `(B, V)`."""
    with torch.no_grad():
        return model(**batch, logits_to_keep=1).logits[:, -1]


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
    """The output of a step, and the gradients of what is trained."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output, [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def losses(trainer: Trainer) -> list[float]:
    """The losses that a trainer logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state dicts are bit-identical."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Files and processes

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def process_environment() -> dict[str, str]:
    """The environment of a process that imports the package, and these helpers."""
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def load_example(name: str) -> Any:
    """A script of examples/, which is no package; one imports another by its name, as when it is run."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


def load_script(path: Path, name: str, known: bool = False) -> Any:
    """A module from a file, under a name of its own; `known`: whether others can import it under this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    if known:
        sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def rewrite(folder: Path, file: str = "adapter_config.json", **changes: object) -> str:
    """Change fields of a JSON file, by default of a saved adapter's config; returns the folder."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return str(folder)
