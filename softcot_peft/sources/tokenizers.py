"""Finds the base's tokenizer and looks up the ids of thought tokens."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..compat.releases import is_empty
from ..config import SoftCoTConfig
from .frozen_lm import FrozenLM
from .names import missing_folder

_tokenizers: dict[str, PreTrainedTokenizerBase] = {}


def use_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> str:
    """Use an already loaded tokenizer for the base's prompts, for example one with tokens added in memory.

    It is kept until the process ends or another tokenizer is registered under the same name. Adapters that are already
    attached keep their tokenizer.

    Args:
        tokenizer: The base's tokenizer.
        name: The base's `name_or_path`, or the name that configs refer to. `None`: the tokenizer's `name_or_path`.

    Returns:
        The name. Pass it as `SoftCoTConfig(tokenizer_name_or_path=...)` if it is not the base's.

    Raises:
        TypeError: The tokenizer is not from transformers, or the name is not a string.
        ValueError: The tokenizer has no name.

    Example:
        ```python
        from peft import get_peft_model
        from softcot_peft import use_tokenizer

        tokenizer.add_tokens(["<doc>"])
        base.resize_token_embeddings(len(tokenizer))
        use_tokenizer(tokenizer)
        model = get_peft_model(base, config)
        ```
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"`tokenizer` must be a loaded tokenizer of transformers, got {type(tokenizer).__name__}.")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"`name` must be a string, got {type(name).__name__}.")
    name = name or tokenizer.name_or_path
    if not name:
        raise ValueError(
            "`name` must be given, since the tokenizer has no `name_or_path` of its own. Pass the base's "
            "`name_or_path`, or another name, and set `tokenizer_name_or_path` to it."
        )
    _tokenizers[name] = tokenizer
    return name


def base_tokenizer(config: SoftCoTConfig, base_name: str | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer registered with `use_tokenizer`, else the one that the config, base or adapter names."""
    name = config.tokenizer_name_or_path or base_name or config.base_model_name_or_path
    remedy = (
        "Set it to the Hub id or folder of the base's tokenizer, or to the name of a loaded one, "
        "`use_tokenizer(tokenizer, name=...)`; or, if the assistant reads the same ids and no `thought_token` and no "
        "`response_marker` is set, `assistant_shares_tokenizer=True` needs none."
    )
    if not name:
        raise ValueError(f"`tokenizer_name_or_path` must be given, since the base has no `name_or_path`. {remedy}")
    if name in _tokenizers:
        return _tokenizers[name]
    revision = config.revision if name == config.base_model_name_or_path else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        if is_empty(tokenizer):
            raise OSError("There are no tokenizer files.")
        return tokenizer
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`tokenizer_name_or_path`: no tokenizer for the base can be loaded from {name!r}: {error} "
            f"{missing_folder(name)}{remedy}"
        ) from error


def thought_token_id(
    config: SoftCoTConfig, tokenizer: PreTrainedTokenizerBase | None, base_vocabulary: int | None
) -> int | None:
    """Return the id of `thought_token` in the base's vocabulary; `None` if the config names none.

    Args:
        config: The adapter's config.
        tokenizer: The base's tokenizer, if the config names a thought token.
        base_vocabulary: Number of ids that the base has embeddings for. `None`: the id is not checked.

    Raises:
        ValueError: The thought token is not a single token, or has no embedding.
    """
    if config.thought_token is None or tokenizer is None:
        return None
    remedy = "If it was added in memory, call `use_tokenizer(tokenizer)` first."
    found = token_id(tokenizer, config.thought_token, "thought_token", "the base's", remedy)
    if base_vocabulary is not None and found >= base_vocabulary:
        raise ValueError(
            f"`thought_token` must have an embedding in the base, which has {base_vocabulary}, got "
            f"{config.thought_token!r} with id {found}. Call `base.resize_token_embeddings(len(tokenizer))` before "
            "the adapter is attached."
        )
    return found


def token_id(tokenizer: PreTrainedTokenizerBase, token: str, field: str, whose: str, remedy: str) -> int:
    """Return the id of a text that must be a single token.

    Raises:
        ValueError: The vocabulary does not contain the token.
    """
    found = tokenizer.get_vocab().get(token)
    if found is None:
        pieces = tokenizer.tokenize(token)
        raise ValueError(
            f"`{field}` must be one token of {whose} vocabulary, got {token!r}, which is {len(pieces)} tokens there "
            f"({pieces}). {remedy} Choose a token that the vocabulary has, such as a reserved special token."
        )
    return int(found)


def assistant_thought_token_id(config: SoftCoTConfig, assistant: FrozenLM) -> int:
    """Return the id at the assistant's thought positions: the config's token, else unk, else eos, else pad."""
    tokenizer, limit, token = assistant.tokenizer, assistant.vocabulary, config.assistant_thought_token
    if token is not None:
        remedy = "If it was added in memory, pass model and tokenizer to `use_assistant` first."
        found = token_id(tokenizer, token, "assistant_thought_token", "the assistant's", remedy)
        if found >= limit:
            raise ValueError(
                f"`assistant_thought_token` must have an embedding in the assistant, which has {limit}, got {token!r} "
                f"with id {found}. Choose another token, or resize the assistant and pass it to `use_assistant`."
            )
        return found
    for special in (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if special is not None and special < limit:
            return int(special)
    raise ValueError(
        f"`assistant_thought_token` must be given, since the tokenizer of {assistant.name!r} has no unk, eos or pad "
        "token that the assistant has an embedding for. Name any other token of its vocabulary."
    )
