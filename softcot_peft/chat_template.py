"""`with_thought_tokens`: adds the run of thought tokens to a tokenizer's chat template."""

from __future__ import annotations

import copy
from typing import Literal, TypeVar, get_args

from transformers import PreTrainedTokenizerBase

from .config import SoftCoTConfig

_T = TypeVar("_T", bound=PreTrainedTokenizerBase)
Where = Literal["user_turn", "generation_prompt", "placeholder"]

_PLACEHOLDER = "{thoughts}"

# Jinja: N, and the run with the texts around it.
_NUMBER = "(num_thought_tokens | default({number}))"
_RUN = "{before} + {token} * " + _NUMBER + " + {after}"

# Jinja: rebuilds `messages` with the run in the last user turn. The tokenizer's template follows.
_REBUILD = (
    """\
{{%- set softcot_run = """
    + _RUN
    + " if "
    + _NUMBER
    + """ > 0 else '' -%}}
{{%- set softcot = namespace(last=-1, messages=[]) -%}}
{{%- for message in messages -%}}
    {{%- if message['role'] == 'user' -%}}{{%- set softcot.last = loop.index0 -%}}{{%- endif -%}}
{{%- endfor -%}}
{{%- for message in messages -%}}
    """
)
_USER_TURN = (
    _REBUILD
    + """{{%- if loop.index0 != softcot.last -%}}
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
)
_IN_TEXT = (
    _REBUILD
    + """{{%- set softcot.found = 0 -%}}
    {{%- set softcot.run = softcot_run if loop.index0 == softcot.last else '' -%}}
    {{%- if message['role'] == 'user' and message['content'] is string -%}}
        {{%- set softcot.found = message['content'].split({placeholder}) | length - 1 -%}}
        {{%- set message = dict(message, content=message['content'].replace({placeholder}, softcot.run)) -%}}
    {{%- elif message['role'] == 'user' -%}}
        {{%- set softcot.parts = [] -%}}
        {{%- for part in message['content'] -%}}
            {{%- if part['type'] == 'text' -%}}
                {{%- set softcot.found = softcot.found + (part['text'].split({placeholder}) | length - 1) -%}}
                {{%- set part = dict(part, text=part['text'].replace({placeholder}, softcot.run)) -%}}
            {{%- endif -%}}
            {{%- set softcot.parts = softcot.parts + [part] -%}}
        {{%- endfor -%}}
        {{%- set message = dict(message, content=softcot.parts) -%}}
    {{%- endif -%}}
    {{%- if loop.index0 == softcot.last and softcot.found != 1 -%}}
        {{{{- raise_exception({complaint} ~ softcot.found ~ ' times.') -}}}}
    {{%- endif -%}}
    {{%- set softcot.messages = softcot.messages + [message] -%}}
{{%- endfor -%}}
{{%- set messages = softcot.messages %}}
"""
)
_GENERATION_PROMPT = "{{%+ if add_generation_prompt and " + _NUMBER + " > 0 %}}{{{{ " + _RUN + " }}}}{{% endif %}}"


def with_thought_tokens(
    tokenizer: _T,
    config: SoftCoTConfig,
    where: Where = "user_turn",
    before: str = "",
    after: str = "",
    placeholder: str = _PLACEHOLDER,
) -> _T:
    """Return a copy of a tokenizer whose chat template inserts the run of thought tokens.

    Save it with the adapter, and pass it to chat pipelines (`pipeline(..., tokenizer="my-adapter")`), so that thoughts
    are placed as in training. The run has `config.num_thought_tokens` tokens. To change the number, call
    `apply_chat_template(..., num_thought_tokens=4)`; with 0, the prompt has neither the run nor the texts around it.

    Args:
        tokenizer: The base's tokenizer, with a chat template.
        config: The adapter's config, with a `thought_token`.
        where: `"user_turn"`: at the end of the last user turn, as in the paper. `"generation_prompt"`: after the
            generation prompt, if one is rendered. Training rows that include the response (as in TRL) have no
            generation prompt and get no run: train with `placement="prompt_end"`, which puts the thoughts in the same
            place, or insert the run (and `before` and `after`) into the rows yourself. `"placeholder"`: in the place
            of `placeholder` in the text of the last user turn, which must contain it once; rendering other
            conversations fails. Earlier user turns are rendered without their placeholders.
        before: Text right before the run, such as a sentence that introduces the thoughts, or a marker token.
        after: Text right after the run.
        placeholder: The text that the run replaces. For `where="placeholder"` only.

    Returns:
        The copy. The tokenizer itself is not modified.

    Raises:
        TypeError: `tokenizer` is not a tokenizer, `config` is not a `SoftCoTConfig`, or a text is not a string.
        ValueError: `where` is invalid, the config has no thought token, the tokenizer has no chat template, the
            tokenizer does not encode the thought token as one token, also between `before` and `after`, or a text
            contains the thought token.

    Example:
        ```python
        from softcot_peft import SoftCoTConfig, with_thought_tokens

        config = SoftCoTConfig(
            assistant_model_name_or_path="path/to/assistant", thought_token="<thought>", task_type="CAUSAL_LM"
        )
        messages = [{"role": "user", "content": "How many legs do seven dogs have?"}]
        marked = with_thought_tokens(tokenizer, config, before=" Thoughts: [", after="]")
        inputs = marked.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)

        placed = with_thought_tokens(tokenizer, config, where="placeholder")
        messages = [{"role": "user", "content": "Use this hint: {thoughts} How many legs do seven dogs have?"}]
        inputs = placed.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        ```
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"`tokenizer` must be a tokenizer of transformers, got {type(tokenizer).__name__}.")
    if not isinstance(config, SoftCoTConfig):
        raise TypeError(f"`config` must be a SoftCoTConfig, got {type(config).__name__}.")
    if where not in get_args(Where):
        raise ValueError(f"`where` must be 'user_turn', 'generation_prompt' or 'placeholder', got {where!r}.")
    token = config.thought_token
    if token is None:
        raise ValueError("`thought_token` must be set in the config, got None. Name a token of the base's vocabulary.")
    if tokenizer.chat_template is None:
        raise ValueError(
            "`tokenizer` must have a chat template, got none. Set `tokenizer.chat_template`, or write the run into "
            "your prompts yourself."
        )
    _check_texts({"before": before, "after": after, "placeholder": placeholder}, token, where)
    _check_run(tokenizer, token, config.num_thought_tokens, before, after, where)
    complaint = f"The last user message must contain the placeholder {placeholder!r} once, but contains it "
    texts = {"token": token, "before": before, "after": after, "placeholder": placeholder, "complaint": complaint}
    values = {name: _jinja_literal(text) for name, text in texts.items()}

    def with_run(template: str) -> str:
        if where == "generation_prompt":
            addition = _GENERATION_PROMPT.format(number=config.num_thought_tokens, **values)
            return template.removesuffix("\n") + addition
        rebuild = _USER_TURN if where == "user_turn" else _IN_TEXT
        return rebuild.format(number=config.num_thought_tokens, **values) + template

    tokenizer = copy.deepcopy(tokenizer)
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {name: with_run(text) for name, text in tokenizer.chat_template.items()}
    else:
        tokenizer.chat_template = with_run(tokenizer.chat_template)
    return tokenizer


def _check_texts(texts: dict[str, str], token: str, where: str) -> None:
    """Reject what is not text, text that would lengthen or interrupt the run, and a placeholder without effect."""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"`{name}` must be a string, got {type(text).__name__}.")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"`{name}` must be text that UTF-8 can encode, got {text!r}, which has surrogates.")
        if token in text and (name != "placeholder" or where == "placeholder"):
            raise ValueError(
                f"`{name}` must not contain the thought token {token!r}, got {text!r}: the run could not be told from "
                "it. Choose another text."
            )
    placeholder = texts["placeholder"]
    if where != "placeholder" and placeholder != _PLACEHOLDER:
        raise ValueError(
            f"`placeholder` must be left out with `where={where!r}`, got {placeholder!r}. Set `where='placeholder'` "
            "to put the run in its place."
        )
    if not placeholder:
        raise ValueError(
            "`placeholder` must be a text that user messages contain, got ''. Choose one, or leave it out."
        )


def _check_run(
    tokenizer: PreTrainedTokenizerBase, token: str, number: int, before: str, after: str, where: str
) -> None:
    """Reject a thought token that is not read back as a run, alone or between its neighbours."""
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None or tokenizer.encode("a" + token * 2, add_special_tokens=False)[-2:] != [token_id] * 2:
        raise ValueError(
            f"`thought_token` must be one token of the tokenizer wherever it is written, but a run of {token!r} is "
            "not read back as a run. Choose a special token."
        )
    if not before and not after and where != "placeholder":
        return
    following = after or ("a" if where == "placeholder" else "")
    for length in sorted({1, 2, number}):
        ids = tokenizer.encode((before or "a") + token * length + following, add_special_tokens=False)
        start = ids.index(token_id) if token_id in ids else 0
        if ids[start : start + length] != [token_id] * length or ids.count(token_id) != length:
            raise ValueError(
                f"`before` and `after` must leave the run as it is, but {length} of {token!r} are not read back as "
                f"a run between {before!r} and {following!r}. Choose other texts, or another `thought_token`."
            )


def _jinja_literal(text: str) -> str:
    """Return a Jinja string literal of a text, in ASCII and without braces, which start and end Jinja's blocks."""
    escaped = text.encode("unicode_escape").decode("ascii")
    for character in "'{}":
        escaped = escaped.replace(character, f"\\x{ord(character):02x}")
    return f"'{escaped}'"
