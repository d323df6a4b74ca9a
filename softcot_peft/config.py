"""`SoftCoTConfig`: what an adapter is, as data; its fields are checked alone and against each other."""

from __future__ import annotations

import inspect
import os
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftType, TaskType

from .checkpoint.card import write_usage
from .checkpoint.untrusted import has_pickle_alone, pickled

_POSITIVE = ("num_thought_tokens", "inference_num_thought_tokens")
_REQUIRED = ("thought_source", "projection")
_TEXTS = (
    *_REQUIRED,
    "assistant_model_name_or_path",
    "assistant_revision",
    "thought_token",
    "assistant_prompt",
    "assistant_thought_token",
    "tokenizer_name_or_path",
)
_PLACES = ("assistant_model_name_or_path", "tokenizer_name_or_path")  # of them, those that may be a folder's path
_FLAGS = ("assistant_shares_tokenizer", "init_weights", "two_pass_training")  # the first may be None
_MOST = 2**16  # thoughts; more than any LM reads well, and few enough that a stranger's config takes no memory
_PLACEMENTS = ("prompt_end", "thought_token")


@dataclass
class SoftCoTConfig(PeftConfig):
    """Configuration of a SoftCoT adapter (arXiv 2502.12134).

        >>> config = SoftCoTConfig(assistant_model_name_or_path="Qwen/Qwen2.5-0.5B-Instruct", task_type="CAUSAL_LM")

    Args:
        assistant_model_name_or_path: Hub id or folder of the frozen assistant LM, or the name given to
            [`use_assistant`]. Required by the source `"assistant"`.
        assistant_revision: Commit, tag or branch of the assistant. The resolved commit is written on save.
        num_thought_tokens: N, the number of soft thoughts, in training and wherever a text is scored. The paper trains
            with 32.
        inference_num_thought_tokens: N when text is written (`generate`, a forward without labels) and thoughts are
            placed automatically. `None`: as in training. The paper uses 4. A text that is scored (a forward with
            labels, in training or eval mode) always has `num_thought_tokens`.
        thought_token: Token of the base's vocabulary that marks thought positions in a prompt. `None`: automatic
            placement only.
        placement: `"prompt_end"`: thoughts stand where the prompt ends, unless the prompt holds a run of
            `thought_token` itself. `"thought_token"`: the adapter was trained with the run in the prompt, and a prompt
            without one is refused.
        assistant_prompt: Template with `{prompt}` and, if wanted, `{num_thought_tokens}` that the assistant reads,
            through its own chat template when it has one. `None`: the prompt itself.
        assistant_thought_token: What stands at the thought positions of the assistant's input. `None`: its unk, else
            its eos, else its pad token.
        assistant_shares_tokenizer: `True`: the prompt's ids are fed to the assistant as they are. `False`: they are
            decoded and encoded again. `None`: the two tokenizers are compared.
        tokenizer_name_or_path: The base's tokenizer when it is not where the base is.
        assistant_dtype: Dtype to load the assistant in, such as `"bfloat16"`; `"auto"` is the checkpoint's own.
        thought_source: What reads the prompt: `"assistant"`, or the name of a source given to
            [`~softcot_peft.sources.register_source`].
        projection: What turns the source's states into soft thoughts: `"linear"`, or the name of a projection given to
            [`~softcot_peft.sources.register_projection`].
        init_weights: `True`: the linear layer's usual initialisation. `False`: random values large enough to see in a
            test.
        two_pass_training: Whether training steps run prompts without gradient into a cache, and only thoughts and
            response with gradient, wherever the base allows it: the same loss and gradients at half the time. The
            outputs of such a step have no logits (`logits` is `None`). `False`: always one pass, with logits.
        assistant_hidden_size: Width of the assistant's last hidden states. Written on save, checked on load.
        base_hidden_size: Width of the base's input embeddings. Written on save, checked on load.
        softcot_peft_version: Version of this package that saved the adapter.
        interrupted_save: Found in `adapter_config.json` where version 0.1.0 was killed while saving; no field.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field has a value it cannot have, or two fields contradict each other.
    """

    assistant_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the frozen assistant LM."}
    )
    assistant_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the assistant."})
    num_thought_tokens: int = field(default=32, metadata={"help": "Number of soft thoughts while training."})
    inference_num_thought_tokens: int | None = field(
        default=None, metadata={"help": "Number of soft thoughts when text is written; None: as in training."}
    )
    thought_token: str | None = field(
        default=None, metadata={"help": "Token of the base's vocabulary that marks thought positions."}
    )
    placement: Literal["prompt_end", "thought_token"] = field(
        default="prompt_end", metadata={"help": "Where thoughts stand: 'prompt_end' or 'thought_token'."}
    )
    assistant_prompt: str | None = field(
        default=None, metadata={"help": "Template with {prompt} that the assistant reads."}
    )
    assistant_thought_token: str | None = field(
        default=None, metadata={"help": "Token at the thought positions of the assistant's input."}
    )
    assistant_shares_tokenizer: bool | None = field(
        default=None, metadata={"help": "Whether the assistant can read the base's ids; None: compare."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "The base's tokenizer when it is not where the base is."}
    )
    assistant_dtype: str = field(default="auto", metadata={"help": "Dtype to load the assistant in."})
    thought_source: str = field(default="assistant", metadata={"help": "What reads the prompt."})
    projection: str = field(default="linear", metadata={"help": "What turns states into soft thoughts."})
    init_weights: bool = field(default=True, metadata={"help": "Whether to use the usual initialisation."})
    two_pass_training: bool = field(
        default=True, metadata={"help": "Whether training runs prompts without gradient, where it can."}
    )
    assistant_hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the assistant's last hidden states. Written on save."}
    )
    base_hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the base's input embeddings. Written on save."}
    )
    softcot_peft_version: str | None = field(
        default=None, metadata={"help": "Version of softcot-peft that saved the adapter. Written on save."}
    )

    # PEFT reads this from every config. The layer is found through `get_input_embeddings()`; naming it here would make
    # PEFT save the whole embedding matrix. Not a field, so that it is not written to adapter_config.json.
    target_modules: ClassVar[None] = None

    interrupted_save: InitVar[bool] = False

    def __post_init__(self, interrupted_save: bool) -> None:
        if interrupted_save:
            raise ValueError(
                "`adapter_config.json` must be an adapter's config, got the mark of a save by softcot-peft 0.1.0 that "
                "was killed. Move the files of the folder's `.softcot-staged` up into the folder, which finishes the "
                "save, or save the adapter again."
            )
        super().__post_init__()
        self.peft_type = PeftType["SOFTCOT"]
        self.assistant_dtype = str(self.assistant_dtype).removeprefix("torch.")
        if self.task_type not in (None, TaskType.CAUSAL_LM):
            raise ValueError(
                f"`task_type` must be 'CAUSAL_LM' or None, got {str(self.task_type)!r}: soft thoughts are read by a "
                "language model that goes on writing."
            )
        self._check_types()
        self._check_values()

    def _check_types(self) -> None:
        for name in _TEXTS:
            value = getattr(self, name)
            if isinstance(value, os.PathLike) and name in _PLACES:
                value = os.fspath(value)
                setattr(self, name, value)
            if value is not None and not isinstance(value, str):
                raise TypeError(
                    f"`{name}` must be a string, got {type(value).__name__}."
                    + (" Pass a loaded model with `use_assistant`." if name == _PLACES[0] else "")
                )
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is None and name != _POSITIVE[0]:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be an integer, got {value!r}.")
        for name in _FLAGS:
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or name != _FLAGS[0]):
                raise TypeError(f"`{name}` must be True or False, got {value!r}.")

    def _check_values(self) -> None:
        for name in _REQUIRED:
            if not getattr(self, name):
                raise ValueError(f"`{name}` must be the name of a registered one, got {getattr(self, name)!r}.")
        if self.thought_source == "assistant" and not self.assistant_model_name_or_path:
            raise ValueError(
                "`assistant_model_name_or_path` must name the assistant, got "
                f"{self.assistant_model_name_or_path!r}. Pass a Hub id, a folder, or the name of a loaded model given "
                "to `use_assistant`."
            )
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
            if value is not None and value > _MOST:
                raise ValueError(f"`{name}` must be at most {_MOST}, got {value}.")
        if self.placement not in _PLACEMENTS:
            raise ValueError(f"`placement` must be one of {_PLACEMENTS}, got {self.placement!r}.")
        if self.placement == "thought_token" and not self.thought_token:
            raise ValueError(
                "`placement='thought_token'` needs `thought_token`, got None. Name the token of the base's vocabulary "
                "that marks thought positions, or use `placement='prompt_end'`."
            )
        if self.assistant_prompt is not None and "{prompt}" not in self.assistant_prompt:
            raise ValueError(
                f"`assistant_prompt` must contain '{{prompt}}', got {self.assistant_prompt!r}. Write {{prompt}} where "
                "the base's prompt belongs."
            )
        if self.assistant_prompt is not None and self.assistant_shares_tokenizer:
            raise ValueError(
                "`assistant_prompt` wraps the prompt's text, so `assistant_shares_tokenizer=True` (ids fed as they "
                "are) contradicts it. Leave one of the two at None."
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read `adapter_config.json`, unless the adapter's weights are a pickle.

        Args:
            pretrained_model_name_or_path: Hub id or folder of the adapter.
            subfolder: Folder within it.
            **kwargs: As [`~peft.PeftConfig.from_pretrained`] takes them.

        Raises:
            ValueError: There is no config, or a pickle and no safetensors file beside it; or fields of the config are
                passed, which PEFT would ignore.
        """
        name = str(pretrained_model_name_or_path)
        hub = inspect.signature(hf_hub_download).parameters
        if overrides := [key for key in kwargs if key in cls.__annotations__ and key not in hub]:
            raise ValueError(
                f"`from_pretrained` must get no fields of the adapter's config, got {overrides}, which PEFT ignores. "
                f"Change a loaded config instead: `config = SoftCoTConfig.from_pretrained({name!r})`, set "
                f"`config.{overrides[0]}`, and pass `config=config` to `PeftModel.from_pretrained`."
            )
        config: PeftConfig = super().from_pretrained(name, subfolder=subfolder, **kwargs)
        if has_pickle_alone(name, subfolder, kwargs):
            raise ValueError(pickled(name))
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` and, in the model card, how to load the adapter.

        Args:
            save_directory: Folder of the adapter; made if needed.
            **kwargs: As [`~peft.PeftConfig.save_pretrained`] takes them.
        """
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        write_usage(card, self.base_model_name_or_path, self.assistant_model_name_or_path)
