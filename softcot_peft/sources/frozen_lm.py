"""`FrozenLM`: a causal LM that reads prompts. Loaded on first use and shared by all adapters that name it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..checkpoint.untrusted import check_shards, meta_model
from ..compat.engines import loaded_whole
from ..compat.eval_mode import evaluating, frozen
from ..compat.models import backbone_of, embedding_width, head_width, num_embeddings, position_limit
from ..compat.releases import is_empty
from .backbone import Backbone
from .names import missing_folder

REMEDY = "Set its Hub id or folder, or pass a loaded one with `use_assistant(model, tokenizer, name=...)`."


def load_error_message(name: str, error: Exception) -> str:
    """Return the error message for an assistant that cannot be loaded."""
    if isinstance(error, HFValidationError) or isinstance(
        error.__cause__, HFValidationError
    ):  # its message does not mention folders
        error = ValueError("There is no such folder, and a Hub id has the form 'name' or 'owner/name'.")
    return (
        f"`assistant_model_name_or_path` must name a decoder LM that can be loaded, got {name!r}: {error} "
        f"{missing_folder(name)}{REMEDY}"
    )


class FrozenLM:
    """A frozen causal LM that reads prompts and returns the hidden states at the thought positions.

    Adapters hold it outside the module tree, so that it is never saved, cast, counted or set to training mode with the
    base. Its weights are loaded on first use, without the head.

    Args:
        name: Hub id, folder, or name registered with `use_assistant`.
        config: Config of the model.
        find: Function without arguments that finds the assistant again in another process; must be picklable.
        revision: Resolved commit, else the requested revision.
        dtype: Dtype to load the weights in, or "auto".
        model: The loaded model, or `None` to load it on first use.
        tokenizer: The loaded tokenizer, or `None` to load it on first use.
    """

    def __init__(
        self,
        name: str,
        config: PretrainedConfig,
        find: Callable[[], FrozenLM],
        revision: str | None = None,
        dtype: str = "auto",
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self._find = find
        self.revision = revision
        self.dtype = dtype
        self.preloaded_model = model
        self._preloaded_backbone = None if model is None else Backbone(backbone_of(model), model.get_input_embeddings)
        self._tokenizer = tokenizer
        # Threads load the model only once and take turns with the tokenizer, which keeps call options as state.
        self.lock = RLock()
        self._loaded: dict[torch.device, Backbone] = {}
        self._users: WeakKeyDictionary[object, torch.device] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenLM:
        """Copies of a base share the assistant."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle how to find the assistant, not its weights."""
        return self._find, ()

    @cached_property
    def hidden_size(self) -> int:
        """Width of the last hidden states. Known before the weights are loaded."""
        return head_width(self._structure())

    @cached_property
    def embedding_size(self) -> int:
        """Width of the input embeddings. Known before the weights are loaded."""
        return embedding_width(self._structure().get_input_embeddings())

    def _structure(self) -> PreTrainedModel:
        """Return the model, or one without weights."""
        if self.preloaded_model is not None:
            return self.preloaded_model
        try:
            with loaded_whole(), meta_model():
                model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        except Exception as error:  # untrusted configs can fail anywhere
            raise ValueError(load_error_message(self.name, error)) from error
        return model

    @property
    def vocabulary(self) -> int:
        """Number of ids that the assistant has embeddings for."""
        return num_embeddings(self.config, self.preloaded_model)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The assistant's tokenizer.

        Raises:
            ValueError: No tokenizer can be loaded from the assistant's name.
        """
        if self._tokenizer is None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.name, revision=self.revision, trust_remote_code=False)
                if is_empty(tokenizer):
                    raise OSError("There are no tokenizer files.")
                self._tokenizer = tokenizer
            except Exception as error:  # untrusted files can fail anywhere
                raise ValueError(
                    f"`assistant_model_name_or_path`: no tokenizer can be loaded from {self.name!r}: {error} Pass it "
                    "with `use_assistant(model, tokenizer, name=...)`."
                ) from error
        return self._tokenizer

    def backbone(self, device: torch.device) -> PreTrainedModel:
        """Return the model without its head, for bases on `device`."""
        return self._backbone(device).model

    def _backbone(self, device: torch.device, user: object | None = None) -> Backbone:
        """Return the model without its head. A model that this package loads is on the base's device and never moves.

        Frees models on devices that no living `user` requested last.
        """
        if device.type == "meta":
            raise ValueError(
                "The base's input embeddings must be on a device with values when it runs, got 'meta'. Load the "
                "base's weights first."
            )
        if self._preloaded_backbone is not None:
            return self._preloaded_backbone
        with self.lock:
            if user is not None:
                self._users[user] = device
            needed = {device, *self._users.values()}
            self._loaded = {where: backbone for where, backbone in self._loaded.items() if where in needed}
            if device not in self._loaded:
                self._loaded[device] = self._load(device)
            return self._loaded[device]

    def release(self) -> None:
        """Free weights that this package loaded. They are loaded again when the assistant runs again."""
        with self.lock:
            self._loaded = {}

    def _load(self, device: torch.device) -> Backbone:
        options = {"dtype": self.dtype, "use_safetensors": True, "trust_remote_code": False}
        try:
            check_shards(self.name, self.revision)
            with loaded_whole():
                model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                    self.name, revision=self.revision, **options
                )
        except Exception as error:  # untrusted files can fail anywhere
            raise ValueError(
                f"`assistant_model_name_or_path`: the weights of {self.name!r} cannot be loaded: {error} They "
                "must be safetensors; pass a model loaded otherwise with `use_assistant`."
            ) from error
        backbone, table = backbone_of(model), model.get_input_embeddings()
        backbone.requires_grad_(False)
        nn.Module.to(backbone, device)
        return Backbone(backbone, lambda: table)  # keeps no head

    @torch.no_grad()
    def embeddings(self, input_ids: Tensor, device: torch.device) -> Tensor:
        """Return the input embeddings of ids `(T,)`, as the layers read them, `(T, H_embedding)`."""
        backbone = self._backbone(device)
        where = backbone.model.device
        found: Tensor = backbone.table()(input_ids[None].to(device if where.type == "meta" else where))
        return found[0].to(device)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_thoughts: int,
        device: torch.device,
        user: object | None = None,
        vectors: Tensor | None = None,
    ) -> Tensor:
        """Read prompts with thought positions: `t = Assistant([prompt; thought token x N]).hidden[-1]`.

        Args:
            input_ids: `(B, P + N)` int64, left-padded. The last N columns are the thought positions.
            attention_mask: `(B, P + N)`, 1 = attended.
            num_thoughts: N.
            device: Device of the base's embeddings. The result is moved there.
            user: Object of the base. While it lives, the model on `device` stays in memory.
            vectors: `(B, H_embedding)`: what stands at all thought positions of each row, in place of the ids there.

        Returns:
            The last hidden states at the thought positions, `(B, N, H_assistant)`, in the assistant's dtype. They
            have a gradient if `vectors` require one.

        Raises:
            ValueError: The input is longer than the assistant's number of positions.
        """
        limit = position_limit(self.config)
        if limit is not None and input_ids.shape[1] > limit:
            raise ValueError(
                f"Prompt and thoughts must fit into the assistant's {limit} positions, got "
                f"{input_ids.shape[1] - num_thoughts} + {num_thoughts} tokens. Shorten the prompt or choose an "
                "assistant with more positions."
            )
        backbone = self._backbone(device, user)
        where = backbone.model.device
        at = device if where.type == "meta" else where  # accelerate's hooks move the inputs of offloaded models
        # Training and inference compute the same thoughts.
        trains = vectors is not None and vectors.requires_grad and torch.is_grad_enabled()
        with (
            torch.set_grad_enabled(trains),
            torch.autocast(at.type, enabled=False),
            evaluating(backbone.model),
            frozen(backbone.model) if trains else nullcontext(),
        ):
            hidden = backbone.last_states(input_ids.to(at), attention_mask.to(at), num_thoughts, vectors)
        return hidden.to(device)
