"""`ThoughtSource`, the base class of modules that turn prompts into soft thoughts, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..compat.engines import full_shape
from ..config import SoftCoTConfig
from .describe import fields
from .inputs import BaseLM, Precomputed, Prompts
from .registry import Registry
from .tokenizers import base_tokenizer, thought_token_id


class ThoughtSource(nn.Module, ABC):
    """Base class of modules that turn prompts into soft thoughts. Each adapter has one and trains its parameters.

    A source works in two steps, and a subclass implements both. `read` computes states from the prompts, once per
    training step or `generate` call, before the base runs. `project` maps the states to soft thoughts. It runs inside
    the forward pass of the base's input embedding, where engines that shard or offload weights gather the source's.

    Trained parameters must belong to child modules of the source (below, `softcot_table.default.weight` in the model),
    not to the source itself. Frozen models must stay outside the module tree, in an object that is not a module, so
    that they are not saved, cast, counted or set to training mode with the base.

    Args:
        config: The adapter's config.
        base: The base LM.

    Example:
        ```python
        import torch
        from softcot_peft import SoftCoTConfig
        from softcot_peft.sources import BaseLM, Prompts, ThoughtSource, register_source
        from torch import Tensor, nn

        @register_source("prompt_hash")
        class PromptHash(ThoughtSource):
            def __init__(self, config: SoftCoTConfig, base: BaseLM) -> None:
                super().__init__(config, base)
                self.table = nn.Embedding(64, base.hidden_size)

            def read(self, prompts: Prompts, num_thoughts: int) -> Tensor:
                total = (prompts.input_ids * prompts.attention_mask).sum(1)
                rows = (total[:, None] + torch.arange(num_thoughts, device=total.device)) % 64
                return rows[:, None, :, None]  # (B, K, N, H_source)

            def project(self, states: Tensor) -> Tensor:
                return self.table(states[..., 0])

        config = SoftCoTConfig(thought_source="prompt_hash", task_type="CAUSAL_LM")
        ```
    """

    kind: ClassVar[str]  # its registered name
    shares_cache: ClassVar[bool] = False  # whether it reads with the base, and offers `read_into`
    num_chains: int = 1  # K: how many different runs of thoughts the source has for a prompt
    learns_to_read: bool = False  # whether training changes the states that it reads
    id_limit: int | None = None  # number of the base's ids that the source can read; `None`: all

    def __init__(self, config: SoftCoTConfig, base: BaseLM) -> None:
        super().__init__()
        if config.base_hidden_size not in (None, base.hidden_size):
            raise ValueError(
                f"The adapter was trained for a base whose embeddings are {config.base_hidden_size} wide, but this "
                f"base's are {base.hidden_size}. Load it with the base in its `base_model_name_or_path`."
            )
        self.config = config
        self.base = base
        self.base_tokenizer = base_tokenizer(config, base.name_or_path) if self._needs_tokenizer(config) else None
        self.thought_token_id = thought_token_id(config, self.base_tokenizer, base.vocab_size)
        self.precomputed: Precomputed | None = None

    @classmethod
    def _needs_tokenizer(cls, config: SoftCoTConfig) -> bool:
        """Return whether the source needs the base's tokenizer, to look up `thought_token` or to decode rows."""
        return config.thought_token is not None or config.response_marker is not None

    @abstractmethod
    def read(self, prompts: Prompts, num_thoughts: int) -> Tensor:
        """Compute states from prompts.

        Args:
            prompts: The prompts of a batch.
            num_thoughts: N.

        Returns:
            States `(B, C, N, H_source)` of the chains of `prompts`, which may require grad. A row must not depend on
            other rows or on padding.
        """

    def read_own(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        num_thoughts: int,
        rows: int,
        device: torch.device,
        chains: tuple[int, ...] = (0,),
    ) -> Tensor:
        """Compute states from an input that the caller provides (`assistant_input_ids`).

        Args:
            input_ids: `(B, P + N)`. The last N columns are thought positions.
            attention_mask: `(B, P + N)`. `None`: all tokens are attended.
            num_thoughts: N.
            rows: B.
            device: Device of the states to return.
            chains: The chains to read.

        Returns:
            States, like `read`.

        Raises:
            ValueError: The source only reads the base's prompts.
        """
        raise ValueError(
            f"`assistant_input_ids` must not be passed: thought source {self.kind!r} reads the base's prompts. Leave "
            "them out."
        )

    def read_into(self, prompts: Prompts, num_thoughts: int, cache: Any = None) -> tuple[Tensor, Any]:
        """As `read`, if `shares_cache`; also returns the base's cache of the prompts, filled on the way: `cache`,
        which is empty and can be cropped, or with `None` one that the base makes.
        """
        raise NotImplementedError(f"Thought source {self.kind!r} has `shares_cache=True` and must have `read_into`.")

    def states(self, prompts: Prompts, num_thoughts: int) -> Tensor:
        """Return precomputed states if there are any, else those of `read`."""
        known = None
        if self.precomputed is not None:
            known = self.precomputed.find(prompts.input_ids, prompts.attention_mask, num_thoughts)
        if known is None:
            return self.read(prompts, num_thoughts)
        states = known.view(len(known), self.num_chains, num_thoughts, -1)
        return states[:, list(prompts.chains)].to(prompts.device)

    def select_chains(self, chains: int | Sequence[int] | None) -> tuple[int, ...]:
        """Return the chains that a caller asks for: one, some, or with `None` all.

        Raises:
            TypeError: `chains` is neither an integer nor a sequence of integers.
            ValueError: There is no such chain, or one is named twice.
        """
        if chains is None:
            return tuple(range(self.num_chains))
        found = (chains,) if isinstance(chains, int) else tuple(chains) if isinstance(chains, Sequence) else (None,)
        if not all(type(chain) is int for chain in found):
            raise TypeError(f"`chains` must be an integer or a list of integers, got {chains!r}.")
        if not found or len(set(found)) < len(found) or not all(0 <= chain < self.num_chains for chain in found):
            raise ValueError(
                f"`chains` must name some of the adapter's {self.num_chains} (`num_chains`), from 0 to "
                f"{self.num_chains - 1}, each once, got {chains!r}."
            )
        return found

    @abstractmethod
    def project(self, states: Tensor) -> Tensor:
        """Map states `(B, K, N, H_source)` to soft thoughts `(B, K, N, H_base)` of any dtype, on any device."""

    def forward(self, states: Tensor) -> Tensor:
        """Call `project`. Forward hooks on this module can read and replace the soft thoughts."""
        return self.project(states)

    def auxiliary_loss(self, thoughts: Tensor) -> Tensor | None:
        """Return a scalar to add to the training loss, given soft thoughts `(B, K, N, H_base)`, or `None`."""
        return None

    def checkpoint_tensors(self) -> dict[str, torch.Size]:
        """Return the shapes of the tensors that an adapter file must hold, and no others, by name in this module."""
        return {name: full_shape(weight) for name, weight in self.named_parameters()}

    def check_checkpoint(self, tensors: Mapping[str, Tensor]) -> None:
        """Reject tensors of a file that belong to another base or source. Runs before their shapes are checked.

        Args:
            tensors: All tensors of `checkpoint_tensors`.

        Raises:
            ValueError: The tensors do not match.
        """

    def fingerprint(self) -> dict[str, Any]:
        """Return what the states depend on besides the prompt and N, as JSON values, the same in every process."""
        return {"thought_source": self.kind}

    def complete(self, config: SoftCoTConfig) -> None:
        """Add what loading needs to a config before it is saved."""
        config.base_hidden_size = self.base.hidden_size

    def extra_repr(self) -> str:
        """Return what `print` shows of the source: its assistant, N, and fields that are not at their defaults."""
        return fields(self.config)

    def release(self) -> None:
        """Free memory that only `read` needs, until its next call."""


_S = TypeVar("_S", bound=type[ThoughtSource])

SOURCES: Registry[ThoughtSource] = Registry("thought_source", "register_source")


def register_source(name: str) -> Callable[[_S], _S]:
    """Register a thought source under the name that `SoftCoTConfig(thought_source=...)` refers to. A class decorator.

    `adapter_config.json` stores only the name. Import the module that registers the source before loading an adapter.

    Args:
        name: The name that configs refer to.

    Returns:
        The decorator, which returns the class with its `kind` set to the name.

    Raises:
        ValueError: Another class is registered under the name.

    Example:
        ```python
        from softcot_peft import SoftCoTConfig
        from softcot_peft.sources import AssistantSource, register_source

        @register_source("scaled_assistant")
        class ScaledAssistant(AssistantSource):
            def project(self, states):
                return 0.5 * super().project(states)

        config = SoftCoTConfig(thought_source="scaled_assistant", assistant_model_name_or_path="path/to/assistant")
        ```
    """

    def register(source: _S) -> _S:
        source.kind = name
        return SOURCES.register(name)(source)

    return register


def make_source(config: SoftCoTConfig, base: BaseLM) -> ThoughtSource:
    """Create the source that a config names.

    Raises:
        ValueError: No source is registered under the name, or it does not match the base.
    """
    return SOURCES.find(config.thought_source)(config, base)
