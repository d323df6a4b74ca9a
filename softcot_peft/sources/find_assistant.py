"""Finds assistants by name: models registered with `use_assistant`, else models on the Hub or in a folder."""

from __future__ import annotations

from functools import partial
from weakref import WeakValueDictionary

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.untrusted import read_config
from ..compat.engines import is_partitioned
from ..compat.models import check_decoder_lm, head_width
from ..compat.releases import commit_of
from .frozen_lm import REMEDY, FrozenLM, load_error_message

_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64", "float", "half", "double")

_preloaded: dict[str, FrozenLM] = {}
_loaded: WeakValueDictionary[tuple[str, str | None, str], FrozenLM] = WeakValueDictionary()


def use_assistant(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str | None = None
) -> str:
    """Use an already loaded model as assistant, for example one that is quantised, fine-tuned or on another device.

    The model is not moved, cast or modified. It runs in eval mode, and each of its modules returns to its own mode
    afterwards. It is kept until the process ends or another model is registered under the same name. Adapters that
    are already attached keep their assistant.

    Args:
        model: A causal LM with its head, or a PEFT model of one.
        tokenizer: The model's tokenizer. `None`: it is loaded from `name` when needed.
        name: The name that configs refer to. `None`: the model's `name_or_path`. A PEFT model requires a name, since
            the name of its base would stand for the model without fine-tuning when an adapter is reloaded.

    Returns:
        The name, for `SoftCoTConfig(assistant_model_name_or_path=...)`.

    Raises:
        TypeError: The model or the tokenizer is not from transformers, or the name is not a string.
        ValueError: The model is not a decoder LM, has no name, or is partitioned by DeepSpeed.

    Example:
        ```python
        from softcot_peft import SoftCoTConfig, use_assistant
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assistant = AutoModelForCausalLM.from_pretrained("path/to/assistant", dtype="bfloat16")
        tokenizer = AutoTokenizer.from_pretrained("path/to/assistant")
        use_assistant(assistant, tokenizer, name="my-assistant")
        config = SoftCoTConfig(assistant_model_name_or_path="my-assistant", task_type="CAUSAL_LM")
        ```
    """
    loaded: nn.Module = model
    if isinstance(model, PeftModel):
        for config in model.peft_config.values():
            if config.is_prompt_learning or config.peft_type == "SOFTCOT":
                raise ValueError(
                    f"`model` must be tuned in its layers to be an assistant, got {config.peft_type!s}, which acts "
                    "outside of them and would be lost. Pass its base, or a LoRA-tuned model."
                )
        loaded = model.get_base_model()  # still contains the adapter layers
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
    head_width(loaded)  # raises if there is no head
    if is_partitioned(loaded):
        raise ValueError(
            f"`model` must be whole, but the weights of {name!r} are partitioned: it was loaded while DeepSpeed's "
            "ZeRO-3 was on, and no engine gathers them. Load it before `TrainingArguments` or `HfDeepSpeedConfig` "
            "are made, or name it in the config, to be loaded whole in every process."
        )
    _preloaded[name] = FrozenLM(name, loaded.config, partial(_find_preloaded, name), model=loaded, tokenizer=tokenizer)
    return name


def _find_preloaded(name: str) -> FrozenLM:
    """Return the assistant registered under a name.

    Raises:
        ValueError: This process has no assistant of that name.
    """
    if name not in _preloaded:
        raise ValueError(
            f"The assistant {name!r} of a pickled model was given with `use_assistant`, and must be given again in "
            f"this process before the model is read. Call `use_assistant(model, tokenizer, name={name!r})` first."
        )
    return _preloaded[name]


def find_assistant(name: str, revision: str | None = None, dtype: str = "auto") -> FrozenLM:
    """Return the assistant of a name: the one registered with `use_assistant`, else a shared one.

    Reads only the config. The name may come from an untrusted adapter, so remote code never runs, and weights must be
    safetensors.

    Raises:
        ValueError: The assistant cannot be found or is not a decoder LM.
    """
    if name in _preloaded:
        return _preloaded[name]
    if dtype not in _DTYPES:
        raise ValueError(f"`assistant_dtype` must be one of {_DTYPES}, got {dtype!r}. Try 'bfloat16'.")
    try:
        revision = commit_of(name, revision) or revision
        config = read_config(name, revision)
    except Exception as error:  # untrusted files can fail anywhere
        raise ValueError(load_error_message(name, error)) from error
    check_decoder_lm(config, f"The assistant {name!r}", REMEDY)
    key = (name, revision, dtype)
    assistant = _loaded.get(key)
    if assistant is None:
        assistant = _loaded[key] = FrozenLM(
            name, config, partial(find_assistant, name, revision, dtype), revision=revision, dtype=dtype
        )
    return assistant
