"""Finds, loads, freezes, shares and runs the assistant. Knows nothing about PEFT's tuners or about the base."""

from __future__ import annotations

import os
from functools import cached_property
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ._compat import (
    backbone_of,
    check_decoder_lm,
    commit_of,
    head_width,
    is_empty,
    is_partitioned,
    loaded_whole,
    num_embeddings,
    position_limit,
)
from .backbone import Backbone, evaluating
from .untrusted import check_shards, meta_model, read_config

_REMEDY = "Set its Hub id or folder, or pass a loaded one with `use_assistant(model, tokenizer, name=...)`."
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64", "float", "half", "double")


def _unusable(name: str, error: Exception) -> str:
    if isinstance(error, HFValidationError) or isinstance(error.__cause__, HFValidationError):  # speaks of no folders
        error = ValueError("There is no such folder, and a Hub id has the form 'name' or 'owner/name'.")
    return (
        f"`assistant_model_name_or_path` must name a decoder LM that can be loaded, got {name!r}: {error} "
        f"{missing_folder(name)}{_REMEDY}"
    )


def missing_folder(name: str) -> str:
    """Where a name would be a folder, for messages; empty where it is one, or an absolute path."""
    if os.path.isabs(name) or os.path.exists(name):
        return ""
    return (
        f"As a relative path, it stands for {os.path.abspath(name)!r} from here, which does not exist: start where it "
        "was given, or pass an absolute path. "
    )


class Assistant:
    """A frozen causal LM that reads prompts and returns hidden states at the thought positions.

    Held by adapters outside the module tree, so that it is never saved, cast, counted or put into training mode with
    the base. Its weights are loaded when they are first needed, without the head.

    Args:
        name: Hub id, folder, or name given by the user.
        config: Config of the model.
        revision: Resolved commit, else the revision asked for.
        dtype: Dtype to load the weights in, or "auto".
        model: The loaded model, or `None` to load it on first use.
        tokenizer: The loaded tokenizer, or `None` to load it on first use.
    """

    def __init__(
        self,
        name: str,
        config: PretrainedConfig,
        revision: str | None = None,
        dtype: str = "auto",
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self.revision = revision
        self.dtype = dtype
        self.given = model
        self._given_backbone = None if model is None else Backbone(backbone_of(model))
        self._tokenizer = tokenizer
        # Threads load the model once, and take turns with the tokenizer, whose options are state of its own.
        self.lock = RLock()
        self._loaded: dict[torch.device, Backbone] = {}
        self._users: WeakKeyDictionary[object, torch.device] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Assistant:
        """A copied base shares the assistant."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled base names the assistant, and finds it again: it holds no copy of the weights."""
        if self.given is not None:
            return _find_given, (self.name,)
        return find_assistant, (self.name, self.revision, self.dtype)

    @cached_property
    def hidden_size(self) -> int:
        """Width of the last hidden states, known before the weights are loaded."""
        if self.given is not None:
            return head_width(self.given)
        try:
            with loaded_whole(), meta_model():
                model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        except Exception as error:  # a stranger's config can fail anywhere
            raise ValueError(_unusable(self.name, error)) from error
        return head_width(model)

    @property
    def vocabulary(self) -> int:
        """How many ids the assistant has embeddings for."""
        return num_embeddings(self.config, self.given)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The assistant's tokenizer.

        Raises:
            ValueError: There is none at the assistant's name.
        """
        if self._tokenizer is None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.name, revision=self.revision, trust_remote_code=False)
                if is_empty(tokenizer):
                    raise OSError("There are no tokenizer files.")
                self._tokenizer = tokenizer
            except Exception as error:  # a stranger's files can fail anywhere
                raise ValueError(
                    f"`assistant_model_name_or_path`: no tokenizer can be loaded from {self.name!r}: {error} Pass it "
                    "with `use_assistant(model, tokenizer, name=...)`."
                ) from error
        return self._tokenizer

    def backbone(self, device: torch.device) -> PreTrainedModel:
        """The model without its head that reads for bases on `device`."""
        return self._backbone(device).model

    def _backbone(self, device: torch.device, user: object | None = None) -> Backbone:
        """The model without its head. One that this package loads is on the base's device, and is never moved.

        Models on devices where no living `user` has asked last are let go of.
        """
        if device.type == "meta":
            raise ValueError(
                "The base's input embeddings must be on a device with values when it runs, got 'meta'. Load the "
                "base's weights first."
            )
        if self._given_backbone is not None:
            return self._given_backbone
        with self.lock:
            if user is not None:
                self._users[user] = device
            needed = {device, *self._users.values()}
            self._loaded = {where: backbone for where, backbone in self._loaded.items() if where in needed}
            if device not in self._loaded:
                self._loaded[device] = Backbone(self._load(device))
            return self._loaded[device]

    def release(self) -> None:
        """Let go of weights that this package loaded; they are loaded again when the assistant runs again."""
        with self.lock:
            self._loaded = {}

    def _load(self, device: torch.device) -> PreTrainedModel:
        options = {"dtype": self.dtype, "use_safetensors": True, "trust_remote_code": False}
        try:
            check_shards(self.name, self.revision)
            with loaded_whole():
                model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                    self.name, revision=self.revision, **options
                )
        except Exception as error:  # a stranger's files can fail anywhere
            raise ValueError(
                f"`assistant_model_name_or_path`: the weights of {self.name!r} cannot be loaded: {error} They "
                "must be safetensors; pass a model loaded otherwise with `use_assistant`."
            ) from error
        backbone = backbone_of(model)
        backbone.requires_grad_(False)
        nn.Module.to(backbone, device)
        return backbone

    @torch.no_grad()
    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_thoughts: int,
        device: torch.device,
        user: object | None = None,
    ) -> Tensor:
        """Read prompts that end in thought positions: `t = Assistant([prompt; thought token x N]).hidden[-1]`.

        Args:
            input_ids: `(B, P + N)` int64, left-padded, the last N columns being the thought positions.
            attention_mask: `(B, P + N)`, 1 = attended.
            num_thoughts: N.
            device: Where the base's embeddings are; the result goes there.
            user: Who asks: an object of the base, which keeps the model on `device` in memory while it lives.

        Returns:
            The last hidden states at the thought positions, `(B, N, H_assistant)`, in the assistant's dtype.

        Raises:
            ValueError: The input is longer than the assistant has positions for.
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
        at = device if where.type == "meta" else where  # accelerate's hooks move the inputs of offloaded ones
        # the same thoughts in training and inference
        with torch.autocast(at.type, enabled=False), evaluating(backbone.model):
            hidden = backbone.last_states(input_ids.to(at), attention_mask.to(at), num_thoughts)
        return hidden.to(device)


_given: dict[str, Assistant] = {}
_loaded: WeakValueDictionary[tuple[str, str | None, str], Assistant] = WeakValueDictionary()


def use_assistant(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str | None = None
) -> str:
    """Use an already loaded model wherever a config names it: quantised, placed, fine-tuned, or made in memory.

    The model is not moved, cast or changed; it runs in eval mode, and each of its modules has its own mode back
    afterwards. It is kept for the life of the process, or until another one is given the same name. Adapters attached
    before keep the assistant they have.

    Args:
        model: A causal LM with its head, or a PEFT model of one.
        tokenizer: Its tokenizer. `None`: loaded from the name when it is needed.
        name: The name by which configs refer to it. `None`: the model's own `name_or_path`; a PEFT model needs one of
            its own, lest an adapter reload with the untuned model of its base's name.

    Returns:
        The name, for `SoftCoTConfig(assistant_model_name_or_path=...)`.

    Raises:
        TypeError: The model or the tokenizer is not one of transformers, or the name is no string.
        ValueError: The model is not a decoder LM, has no name, or was partitioned by DeepSpeed.
    """
    loaded: nn.Module = model
    if isinstance(model, PeftModel):
        for config in model.peft_config.values():
            if config.is_prompt_learning or config.peft_type == "SOFTCOT":
                raise ValueError(
                    f"`model` must be tuned in its layers to be an assistant, got {config.peft_type!s}, which acts "
                    "outside of them and would be lost. Pass its base, or a LoRA-tuned model."
                )
        loaded = model.get_base_model()  # its adapter layers stay inside
    if not isinstance(loaded, PreTrainedModel):
        raise TypeError(f"`model` must be a loaded transformers model, got {type(loaded).__name__}.")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"`name` must be a string, got {type(name).__name__}.")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"`tokenizer` must be a loaded tokenizer of transformers, got {type(tokenizer).__name__}.")
    name = name or ("" if isinstance(model, PeftModel) else loaded.name_or_path)
    if not name:
        raise ValueError(
            "`name` must be given, since the model has no `name_or_path` of its own. Pass `name='my-assistant'`."
        )
    check_decoder_lm(loaded.config, f"The assistant {name!r}", "Pass a causal LM.", loaded)
    head_width(loaded)  # refuses a model without a head
    if is_partitioned(loaded):
        raise ValueError(
            f"`model` must be whole, but the weights of {name!r} are partitioned: it was loaded while DeepSpeed's "
            "ZeRO-3 was on, and no engine gathers them. Load it before `TrainingArguments` or `HfDeepSpeedConfig` "
            "are made, or name it in the config, to be loaded whole in every process."
        )
    _given[name] = Assistant(name, loaded.config, model=loaded, tokenizer=tokenizer)
    return name


def _find_given(name: str) -> Assistant:
    """The assistant given under a name.

    Raises:
        ValueError: None was given under it in this process.
    """
    if name not in _given:
        raise ValueError(
            f"The assistant {name!r} of a pickled model was given with `use_assistant`, and must be given again in "
            f"this process before the model is read. Call `use_assistant(model, tokenizer, name={name!r})` first."
        )
    return _given[name]


def find_assistant(name: str, revision: str | None = None, dtype: str = "auto") -> Assistant:
    """The assistant of a name: the one given with `use_assistant`, else one shared by all who ask for the same.

    Only its config is read here. Remote code never runs and only safetensors weights are read, since the name may come
    from a stranger's adapter.

    Raises:
        ValueError: It cannot be found or is not a decoder LM.
    """
    if name in _given:
        return _given[name]
    if dtype not in _DTYPES:
        raise ValueError(f"`assistant_dtype` must be one of {_DTYPES}, got {dtype!r}. Try 'bfloat16'.")
    try:
        revision = commit_of(name, revision) or revision
        config = read_config(name, revision)
    except Exception as error:  # a stranger's files can fail anywhere
        raise ValueError(_unusable(name, error)) from error
    check_decoder_lm(config, f"The assistant {name!r}", _REMEDY)
    key = (name, revision, dtype)
    assistant = _loaded.get(key)
    if assistant is None:
        assistant = _loaded[key] = Assistant(name, config, revision=revision, dtype=dtype)
    return assistant
