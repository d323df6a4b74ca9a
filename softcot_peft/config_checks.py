"""Checks the fields of a `SoftCoTConfig`, alone and against each other."""

from __future__ import annotations

import os
from typing import Any

_INT_FIELDS = ("num_thought_tokens", "inference_num_thought_tokens", "num_chains")
_NAME_FIELDS = ("thought_source", "projection")
_STRING_FIELDS = (
    *_NAME_FIELDS,
    "assistant_model_name_or_path",
    "assistant_revision",
    "thought_token",
    "response_marker",
    "assistant_prompt",
    "assistant_prefix",
    "assistant_thought_token",
    "tokenizer_name_or_path",
)
_ASSISTANT_FIELDS = (  # read by the source "assistant" alone
    "assistant_model_name_or_path",
    "assistant_revision",
    "assistant_prompt",
    "assistant_prefix",
    "assistant_prompt_between",
    "assistant_thought_token",
    "assistant_shares_tokenizer",
    "assistant_dtype",
    "chain_init",
    "chain_token_ids",
)
# What the assistant reads is text with any of these.
READ_AS_TEXT = ("assistant_prompt", "assistant_prefix", "assistant_prompt_between")
_PATH_FIELDS = ("assistant_model_name_or_path", "tokenizer_name_or_path")  # string fields that may be paths
_BOOL_FIELDS = ("assistant_shares_tokenizer", "init_weights", "two_pass_training")  # the first may be `None`
_MAX_THOUGHTS = 2**16  # more than any LM reads well, few enough that an untrusted config cannot exhaust memory
_INITIALISATIONS = ("default", "identity", "zero", "matched")
_CHAIN_INITS = (None, "trained", "fixed")
_PLACEMENTS = ("prompt_end", "thought_token")


def check_types(config: Any) -> None:
    """Check the type of each field, and convert paths to strings.

    Raises:
        TypeError: A field has the wrong type.
    """
    for name in _STRING_FIELDS:
        value = getattr(config, name)
        if isinstance(value, os.PathLike) and name in _PATH_FIELDS:
            value = os.fspath(value)
            setattr(config, name, value)
        if value is not None and not isinstance(value, str):
            raise TypeError(
                f"`{name}` must be a string, got {type(value).__name__}."
                + (" Pass a loaded model with `use_assistant`." if name == _PATH_FIELDS[0] else "")
            )
    between = config.assistant_prompt_between
    if between is not None:
        if not isinstance(between, (list, tuple)) or len(between) != 2 or not all(isinstance(x, str) for x in between):
            raise TypeError(f"`assistant_prompt_between` must be two strings, got {between!r}.")
        config.assistant_prompt_between = list(between)  # as JSON has it
    for name in _INT_FIELDS:
        value = getattr(config, name)
        if value is None and name == "inference_num_thought_tokens":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    ids = config.chain_token_ids
    if ids is not None and not (isinstance(ids, (list, tuple)) and all(type(found) is int for found in ids)):
        raise TypeError(f"`chain_token_ids` must be a list of integers, got {ids!r}.")
    config.chain_token_ids = None if ids is None else list(ids)
    if type(config.contrastive_weight) not in (int, float):
        raise TypeError(f"`contrastive_weight` must be a number, got {config.contrastive_weight!r}.")
    for name in _BOOL_FIELDS:
        value = getattr(config, name)
        if not isinstance(value, bool) and (value is not None or name != _BOOL_FIELDS[0]):
            raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def check_values(config: Any) -> None:
    """Check the value of each field, and combinations of fields.

    Raises:
        ValueError: A field has an invalid value, or two fields contradict each other.
    """
    _check_source(config)
    _check_chains(config)
    for name in _INT_FIELDS:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if value is not None and value > _MAX_THOUGHTS:
            raise ValueError(f"`{name}` must be at most {_MAX_THOUGHTS}, got {value}.")
    if config.placement not in _PLACEMENTS:
        raise ValueError(f"`placement` must be one of {_PLACEMENTS}, got {config.placement!r}.")
    if config.placement == "thought_token" and not config.thought_token:
        raise ValueError(
            "`placement='thought_token'` needs `thought_token`, got None. Name the token of the base's vocabulary "
            "that marks thought positions, or use `placement='prompt_end'`."
        )
    if config.response_marker == "":
        raise ValueError(
            "`response_marker` must be a text that introduces the response, such as 'Answer:', got ''. Set it to None "
            "for thoughts at the end of the prompt."
        )
    if config.response_marker is not None and config.placement == "thought_token":
        raise ValueError(
            f"`response_marker={config.response_marker!r}` contradicts `placement='thought_token'`, which requires a "
            "run of `thought_token` in every prompt. Leave one of the two out."
        )
    if config.assistant_prompt is not None and "{prompt}" not in config.assistant_prompt:
        raise ValueError(
            f"`assistant_prompt` must contain '{{prompt}}', got {config.assistant_prompt!r}. Write {{prompt}} where "
            "the base's prompt belongs."
        )
    if config.assistant_prompt_between is not None and not all(config.assistant_prompt_between):
        raise ValueError(
            f"`assistant_prompt_between` must be two texts, got {config.assistant_prompt_between!r}. Name what stands "
            "right before and right behind the question in the base's prompts."
        )
    if config.assistant_shares_tokenizer and (given := [name for name in READ_AS_TEXT if getattr(config, name)]):
        raise ValueError(
            f"`{given[0]}` changes the prompt's text, so `assistant_shares_tokenizer=True` (ids fed as they "
            "are) contradicts it. Leave one of the two at None."
        )


def _check_chains(config: Any) -> None:
    """Check the chains, and what the loss adds for them."""
    if config.chain_init not in _CHAIN_INITS:
        raise ValueError(f"`chain_init` must be one of {_CHAIN_INITS}, got {config.chain_init!r}.")
    if config.thought_source == "base" and config.num_chains != 1:
        raise ValueError(
            f"`num_chains` must be 1 with `thought_source='base'`, got {config.num_chains}: chains differ in what "
            "an assistant reads. Use `thought_source='assistant'`."
        )
    ids = config.chain_token_ids
    if ids is not None and config.num_chains == 1 and config.chain_init is None:
        raise ValueError(
            f"`chain_token_ids` must be None without chains, got {ids!r}. Set `num_chains`, or `chain_init` to train "
            "or choose the embedding of a single one."
        )
    if ids is not None and not (len(ids) == len(set(ids)) == config.num_chains and min(ids, default=-1) >= 0):
        raise ValueError(
            f"`chain_token_ids` must be {config.num_chains} different ids (`num_chains`), got {ids!r}. Name one for "
            "each chain."
        )
    if not 0 <= config.contrastive_weight < float("inf"):
        raise ValueError(f"`contrastive_weight` must be at least 0 and finite, got {config.contrastive_weight}.")


def _check_source(config: Any) -> None:
    """Check what reads prompts, and what maps its states to thoughts."""
    for name in _NAME_FIELDS:
        if not getattr(config, name):
            raise ValueError(f"`{name}` must be the name of a registered one, got {getattr(config, name)!r}.")
    given = [name for name in _ASSISTANT_FIELDS if getattr(config, name) not in (None, "auto")]
    if config.thought_source == "base" and given:
        raise ValueError(
            f"`{given[0]}` is read by `thought_source='assistant'` alone, got {getattr(config, given[0])!r} with "
            "`thought_source='base'`, which has no assistant. Leave one of the two out."
        )
    if config.thought_source == "assistant" and not config.assistant_model_name_or_path:
        raise ValueError(
            "`assistant_model_name_or_path` must name the assistant, got "
            f"{config.assistant_model_name_or_path!r}. Pass a Hub id, a folder, or the name of a loaded model given "
            "to `use_assistant`."
        )
    if config.projection_init not in _INITIALISATIONS:
        raise ValueError(f"`projection_init` must be one of {_INITIALISATIONS}, got {config.projection_init!r}.")
    if config.projection_init != "default" and not config.init_weights:
        raise ValueError(
            f"`projection_init={config.projection_init!r}` contradicts `init_weights=False`, which asks for random "
            "values. Leave one of the two out."
        )
