"""Finds, loads, freezes, shares and runs the assistant. Knows nothing about PEFT's tuners or about the base."""

from __future__ import annotations

from functools import cached_property
from threading import RLock
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ._compat import accepts, check_decoder_lm, commit_of, head_width, is_empty, loaded_whole, position_limit
from .placement import positions

_REMEDY = "Name a decoder LM, or pass a loaded one with `use_assistant(model, tokenizer, name=...)`."


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
        self._given = model
        self._backbone = None if model is None else cast(PreTrainedModel, model.base_model)
        self._tokenizer = tokenizer
        # Threads load the model once, and take turns with the tokenizer, whose options are state of its own.
        self.lock = RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Assistant:
        """A copied base shares the assistant."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled base names the assistant, and finds it again: it holds no copy of the weights."""
        if self._given is not None:
            return _find_given, (self.name,)
        return find_assistant, (self.name, self.revision, self.dtype)

    @cached_property
    def hidden_size(self) -> int:
        """Width of the last hidden states, known before the weights are loaded."""
        if self._given is not None:
            return head_width(self._given)
        with loaded_whole(), torch.device("meta"):
            return head_width(AutoModelForCausalLM.from_config(self.config))

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
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"`assistant_model_name_or_path`: no tokenizer can be loaded from {self.name!r}: {error} Pass it "
                    "with `use_assistant(model, tokenizer, name=...)`."
                ) from error
        return self._tokenizer

    def backbone(self, device: torch.device) -> PreTrainedModel:
        """The model without its head, in eval mode; loaded, or moved with the base, where this package loaded it.

        Args:
            device: Where the base's embeddings are.

        Raises:
            ValueError: The weights cannot be loaded.
        """
        with self.lock:
            backbone = self._backbone
            if backbone is None:
                backbone = self._backbone = self._load()
            if self._given is None and backbone.device != device:
                nn.Module.to(backbone, device)
            return backbone.eval()

    def _load(self) -> PreTrainedModel:
        options = {"dtype": self.dtype, "use_safetensors": True, "trust_remote_code": False}
        try:
            with loaded_whole():
                model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                    self.name, revision=self.revision, **options
                )
        except OSError as error:
            raise ValueError(
                f"`assistant_model_name_or_path`: the weights of {self.name!r} cannot be loaded: {error} They "
                "must be safetensors; pass a model loaded otherwise with `use_assistant`."
            ) from error
        return cast(PreTrainedModel, model.base_model.requires_grad_(False))

    @torch.no_grad()
    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor, num_thoughts: int, device: torch.device
    ) -> Tensor:
        """Read prompts that end in thought positions: `t = Assistant([prompt; thought token x N]).hidden[-1]`.

        Args:
            input_ids: `(B, P + N)` int64, left-padded, the last N columns being the thought positions.
            attention_mask: `(B, P + N)`, 1 = attended.
            num_thoughts: N.
            device: Where the base's embeddings are; the result goes there.

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
        model = self.backbone(device)
        at = (
            device if model.device.type == "meta" else model.device
        )  # accelerate's hooks move inputs of offloaded ones
        arguments = {"input_ids": input_ids.to(at), "attention_mask": attention_mask.to(at)}
        if accepts(model.forward, "position_ids"):
            arguments["position_ids"] = positions(arguments["attention_mask"])
        with torch.autocast(at.type, enabled=False):  # the same thoughts in training and inference
            output = model(**arguments, use_cache=False, return_dict=True)
        return output.last_hidden_state[:, -num_thoughts:].to(device)


_given: dict[str, Assistant] = {}
_loaded: WeakValueDictionary[tuple[str, str | None, str], Assistant] = WeakValueDictionary()


def use_assistant(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str | None = None
) -> str:
    """Use an already loaded model wherever a config names it: quantised, placed, fine-tuned, or made in memory.

    The model is not moved, cast or changed; it is put into eval mode when it runs. It is kept for the life of the
    process, or until another one is given the same name. Adapters attached before keep the assistant they have.

    Args:
        model: A causal LM with its head, or a PEFT model of one.
        tokenizer: Its tokenizer. `None`: loaded from the name when it is needed.
        name: The name by which configs refer to it. `None`: the model's own `name_or_path`; a PEFT model needs one of
            its own, lest an adapter reload with the untuned model of its base's name.

    Returns:
        The name, for `SoftCoTConfig(assistant_model_name_or_path=...)`.

    Raises:
        TypeError: The model is not a transformers model.
        ValueError: It is not a decoder LM, or has no name.
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
    name = name or ("" if isinstance(model, PeftModel) else loaded.name_or_path)
    if not name:
        raise ValueError(
            "`name` must be given, since the model has no `name_or_path` of its own. Pass `name='my-assistant'`."
        )
    check_decoder_lm(loaded.config, f"The assistant {name!r}", "Pass a causal LM.")
    head_width(loaded)  # refuses a model without a head
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

    Args:
        name: Hub id, folder, or name given to `use_assistant`.
        revision: Commit, tag or branch; not looked at for a given assistant.
        dtype: Dtype to load in, or "auto".

    Raises:
        ValueError: It cannot be found or is not a decoder LM.
    """
    if name in _given:
        return _given[name]
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`assistant_dtype` must be 'auto' or a dtype of torch, got {dtype!r}. Try 'bfloat16'.")
    try:
        revision = commit_of(name, revision) or revision
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`assistant_model_name_or_path`: the assistant {name!r} cannot be loaded: {error} {_REMEDY}"
        ) from error
    check_decoder_lm(config, f"The assistant {name!r}", _REMEDY)
    key = (name, revision, dtype)
    assistant = _loaded.get(key)
    if assistant is None:
        assistant = _loaded[key] = Assistant(name, config, revision=revision, dtype=dtype)
    return assistant
