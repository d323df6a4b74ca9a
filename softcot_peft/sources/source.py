"""`ThoughtSource`: what reads prompts and yields soft thoughts, and the registry of its kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..compat.engines import full_shape
from ..config import SoftCoTConfig
from .tokenizers import base_tokenizer, thought_token_id


@dataclass(frozen=True)
class BaseLM:
    """What a source may know of the base LM."""

    name_or_path: str | None
    hidden_size: int  # width of its input embeddings
    vocab_size: int | None  # number of ids that it has embeddings for; `None` if its embedding does not say


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch: the attended tokens before the thoughts, and nothing beyond."""

    input_ids: Tensor  # ids of the base, `(B, P)`, the prompts' ends in the last column
    attention_mask: Tensor  # `(B, P)`, 1 = part of the prompt
    device: torch.device  # where the base's input embeddings are, and the states are wanted


class Precomputed(Protocol):
    """States that were computed before; see [`use_thoughts`]."""

    def find(self, prompt_ids: Tensor, prompt_mask: Tensor, num_thoughts: int) -> Tensor | None:
        """The states of a batch's prompts, `(B, K * N * H_source)`; `None` if any is missing."""


class ThoughtSource(nn.Module):
    """Turns prompts into soft thoughts. One per adapter; its parameters are what is trained and saved.

    The work is divided in two. `read` makes states of the prompts, once per training step or `generate` call, before
    the base runs. `project` turns states into soft thoughts within the forward of the base's input embedding, where
    engines that shard or offload weights bring in those of this module. A subclass implements both:

        @register_source("table")
        class TableSource(ThoughtSource):
            def __init__(self, config: SoftCoTConfig, base: BaseLM) -> None:
                super().__init__(config, base)
                self.table = nn.Embedding(64, base.hidden_size)

            def read(self, prompts: Prompts, num_thoughts: int) -> Tensor:
                total = (prompts.input_ids * prompts.attention_mask).sum(1)
                rows = (total[:, None] + torch.arange(num_thoughts, device=total.device)) % 64
                return rows[:, None, :, None]  # (B, K, N, H_source)

            def project(self, states: Tensor) -> Tensor:
                return self.table(states[..., 0])

        config = SoftCoTConfig(thought_source="table", task_type="CAUSAL_LM")

    Its parameters are those of its children (here `softcot_table.default.weight` in the model): none may be its own.

    Frozen models that a source reads with stay outside the module tree (in an object that is no module), so that they
    are not saved, cast, counted or put into training mode with the base.

    Args:
        config: The adapter's config.
        base: The base LM.
    """

    kind: ClassVar[str]  # its registered name
    num_chains: int = 1  # K
    id_limit: int | None = None  # number of the base's ids that the source can read; `None`: all

    def __init__(self, config: SoftCoTConfig, base: BaseLM) -> None:
        super().__init__()
        self.config = config
        self.base = base
        self.base_tokenizer = base_tokenizer(config, base.name_or_path) if self._needs_tokenizer(config) else None
        self.thought_token_id = thought_token_id(config, self.base_tokenizer, base.vocab_size)
        self.precomputed: Precomputed | None = None

    @classmethod
    def _needs_tokenizer(cls, config: SoftCoTConfig) -> bool:
        """Whether the base's tokenizer is needed: to find the id of `thought_token`, or to decode prompts."""
        return config.thought_token is not None

    def read(self, prompts: Prompts, num_thoughts: int) -> Tensor:
        """Read prompts.

        Args:
            prompts: The prompts of a batch.
            num_thoughts: N.

        Returns:
            States `(B, K, N, H_source)`; may carry gradient. Rows do not depend on each other or on padding.
        """
        raise NotImplementedError

    def read_own(
        self, input_ids: Tensor, attention_mask: Tensor | None, num_thoughts: int, rows: int, device: torch.device
    ) -> Tensor:
        """Read the caller's own input for the source (`assistant_input_ids`).

        Args:
            input_ids: `(B, P + N)`, ending in N thought positions.
            attention_mask: `(B, P + N)`; `None`: all attended.
            num_thoughts: N.
            rows: B.
            device: Where the states are wanted.

        Returns:
            As `read`.

        Raises:
            ValueError: The source reads the base's prompts only.
        """
        raise ValueError(
            f"`assistant_input_ids` must not be passed: thought source {self.kind!r} reads the base's prompts. Leave "
            "them out."
        )

    def states(self, prompts: Prompts, num_thoughts: int) -> Tensor:
        """As `read`, unless the states were computed before."""
        known = None
        if self.precomputed is not None:
            known = self.precomputed.find(prompts.input_ids, prompts.attention_mask, num_thoughts)
        if known is None:
            return self.read(prompts, num_thoughts)
        return known.view(len(known), self.num_chains, num_thoughts, -1).to(prompts.device)

    def project(self, states: Tensor) -> Tensor:
        """Turn states `(B, K, N, H_source)` into soft thoughts `(B, K, N, H_base)`, of any dtype, on any device."""
        raise NotImplementedError

    def forward(self, states: Tensor) -> Tensor:
        """As `project`; hooks on this module see and may replace the soft thoughts."""
        return self.project(states)

    def auxiliary_loss(self, thoughts: Tensor) -> Tensor | None:
        """A scalar to add to the loss of training steps, of soft thoughts `(B, K, N, H_base)`; `None`: nothing."""
        return None

    def checkpoint_tensors(self) -> dict[str, torch.Size]:
        """Exactly the tensors that an adapter's file may hold, by name within this module."""
        return {name: full_shape(weight) for name, weight in self.named_parameters()}

    def check_checkpoint(self, tensors: Mapping[str, Tensor]) -> None:
        """Reject tensors of a file, all of `checkpoint_tensors`, that do not fit; shapes are checked afterwards.

        Raises:
            ValueError: The tensors are those of another base or source.
        """

    def fingerprint(self) -> dict[str, Any]:
        """What the states depend on beside the prompt and N, as numbers and texts for JSON; the same everywhere."""
        return {"thought_source": self.kind}

    def complete(self, config: SoftCoTConfig) -> None:
        """Write into a config, before it is saved, what it takes to load the adapter years later."""
        config.base_hidden_size = self.base.hidden_size

    def release(self) -> None:
        """Let go of memory that reading needs, until the next prompt is read."""


_S = TypeVar("_S", bound=type[ThoughtSource])

_registered: dict[str, type[ThoughtSource]] = {}


def register_source(name: str) -> Callable[[_S], _S]:
    """Register a thought source under the name that `SoftCoTConfig(thought_source=...)` refers to.

    A class decorator; see [`ThoughtSource`] for an example. Adapters name their source in `adapter_config.json`, so
    that whoever loads one imports the module that registers it first.

    Raises:
        ValueError: Another class has the name already.
    """

    def register(source: _S) -> _S:
        known = _registered.setdefault(name, source)
        if (known.__module__, known.__qualname__) != (source.__module__, source.__qualname__):
            raise ValueError(f"`name` must be new, got {name!r}, which {known.__qualname__} has. Choose another.")
        source.kind = name
        _registered[name] = source
        return source

    return register


def make_source(config: SoftCoTConfig, base: BaseLM) -> ThoughtSource:
    """Make the source that a config names.

    Raises:
        ValueError: No source has the name, or it does not fit the base.
    """
    if config.thought_source not in _registered:
        raise ValueError(
            f"`thought_source` must be one of {sorted(_registered)}, got {config.thought_source!r}. If it is your "
            "own, import the module that calls `register_source` first."
        )
    return _registered[config.thought_source](config, base)
