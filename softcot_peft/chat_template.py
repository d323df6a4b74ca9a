"""`with_thought_tokens`: a tokenizer whose chat template writes the run of thought tokens."""

from __future__ import annotations

import copy
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from .config import SoftCoTConfig

_T = TypeVar("_T", bound=PreTrainedTokenizerBase)

# Jinja: rebuild `messages` with the run at the end of the last user turn, then go on with the tokenizer's template.
_USER_TURN = """\
{{%- set softcot_run = {token} * (num_thought_tokens | default({number})) -%}}
{{%- set softcot = namespace(last=-1, messages=[]) -%}}
{{%- for message in messages -%}}
    {{%- if message['role'] == 'user' -%}}{{%- set softcot.last = loop.index0 -%}}{{%- endif -%}}
{{%- endfor -%}}
{{%- for message in messages -%}}
    {{%- if loop.index0 != softcot.last -%}}
        {{%- set softcot.messages = softcot.messages + [message] -%}}
    {{%- elif message['content'] is string -%}}
        {{%- set softcot.messages = softcot.messages + [dict(message, content=message['content'] + softcot_run)] -%}}
    {{%- else -%}}
        {{%- set softcot_part = [{{'type': 'text', 'text': softcot_run}}] -%}}
        {{%- set softcot.messages = softcot.messages + [dict(message, content=message['content'] + softcot_part)] -%}}
    {{%- endif -%}}
{{%- endfor -%}}
{{%- set messages = softcot.messages %}}
"""

_GENERATION_PROMPT = """\
{{%+ if add_generation_prompt %}}{{{{ {token} * (num_thought_tokens | default({number})) }}}}{{% endif %}}"""


def with_thought_tokens(
    tokenizer: _T, config: SoftCoTConfig, where: Literal["user_turn", "generation_prompt"] = "user_turn"
) -> _T:
    """Copy a tokenizer so that its chat template writes the run of thought tokens by itself.

    Save it beside the adapter, and pass it to chat pipelines (`pipeline(..., tokenizer="my-adapter")`), which then
    place thoughts as in training. The run has `config.num_thought_tokens` tokens;
    `apply_chat_template(..., num_thought_tokens=4)` writes another number.

    Args:
        tokenizer: The base's tokenizer, with a chat template.
        config: The adapter's config, with a `thought_token`.
        where: `"user_turn"`: at the end of the last user turn, the paper's place. `"generation_prompt"`: after the
            generation prompt, when one is rendered. Rows that are rendered with their response (as TRL does) have none
            and get no run: train with `placement="prompt_end"` there, which puts the thoughts in the same place, or
            write the run into the training rows yourself.

    Returns:
        A copy; the tokenizer itself stays as it is.

    Raises:
        TypeError: The tokenizer or the config is none.
        ValueError: `where` is neither, the config has no thought token, the tokenizer no chat template, or the thought
            token, written as text, is not read back as one token.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"`tokenizer` must be a tokenizer of transformers, got {type(tokenizer).__name__}.")
    if not isinstance(config, SoftCoTConfig):
        raise TypeError(f"`config` must be a SoftCoTConfig, got {type(config).__name__}.")
    if where not in ("user_turn", "generation_prompt"):
        raise ValueError(f"`where` must be 'user_turn' or 'generation_prompt', got {where!r}.")
    token = config.thought_token
    if token is None:
        raise ValueError("`thought_token` must be set in the config, got None. Name a token of the base's vocabulary.")
    if tokenizer.chat_template is None:
        raise ValueError(
            "`tokenizer` must have a chat template, got none. Set `tokenizer.chat_template`, or write the run into "
            "your prompts yourself."
        )
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None or tokenizer.encode("a" + token * 2, add_special_tokens=False)[-2:] != [token_id] * 2:
        raise ValueError(
            f"`thought_token` must be one token of the tokenizer wherever it is written, but a run of {token!r} is "
            "not read back as a run. Choose a special token."
        )
    values = {
        "token": "'" + token.replace("\\", "\\\\").replace("'", "\\'") + "'",
        "number": config.num_thought_tokens,
    }

    def change(template: str) -> str:
        if where == "user_turn":
            return _USER_TURN.format(**values) + template
        return template.removesuffix("\n") + _GENERATION_PROMPT.format(**values)

    tokenizer = copy.deepcopy(tokenizer)
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {name: change(text) for name, text in tokenizer.chat_template.items()}
    else:
        tokenizer.chat_template = change(tokenizer.chat_template)
    return tokenizer
