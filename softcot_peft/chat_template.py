"""`with_thought_tokens`: adds the run of thought tokens to a tokenizer's chat template."""

from __future__ import annotations

import copy
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from .config import SoftCoTConfig

_T = TypeVar("_T", bound=PreTrainedTokenizerBase)

# Jinja: rebuilds `messages` with the run at the end of the last user turn. The tokenizer's template follows.
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
    """Return a copy of a tokenizer whose chat template inserts the run of thought tokens.

    Save it with the adapter, and pass it to chat pipelines (`pipeline(..., tokenizer="my-adapter")`), so that thoughts
    are placed as in training. The run has `config.num_thought_tokens` tokens. To change the number, call
    `apply_chat_template(..., num_thought_tokens=4)`.

    Args:
        tokenizer: The base's tokenizer, with a chat template.
        config: The adapter's config, with a `thought_token`.
        where: `"user_turn"`: at the end of the last user turn, as in the paper. `"generation_prompt"`: after the
            generation prompt, if one is rendered. Training rows that include the response (as in TRL) have no
            generation prompt and get no run: train with `placement="prompt_end"`, which puts the thoughts in the same
            place, or insert the run into the rows yourself.

    Returns:
        The copy. The tokenizer itself is not modified.

    Raises:
        TypeError: `tokenizer` is not a tokenizer, or `config` is not a `SoftCoTConfig`.
        ValueError: `where` is invalid, the config has no thought token, the tokenizer has no chat template, or the
            tokenizer does not encode the thought token as one token.

    Example:
        ```python
        from softcot_peft import SoftCoTConfig, with_thought_tokens

        config = SoftCoTConfig(
            assistant_model_name_or_path="path/to/assistant", thought_token="<thought>", task_type="CAUSAL_LM"
        )
        tokenizer = with_thought_tokens(tokenizer, config)
        messages = [{"role": "user", "content": "How many legs do seven dogs have?"}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        ```
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

    def with_run(template: str) -> str:
        if where == "user_turn":
            return _USER_TURN.format(**values) + template
        return template.removesuffix("\n") + _GENERATION_PROMPT.format(**values)

    tokenizer = copy.deepcopy(tokenizer)
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {name: with_run(text) for name, text in tokenizer.chat_template.items()}
    else:
        tokenizer.chat_template = with_run(tokenizer.chat_template)
    return tokenizer
