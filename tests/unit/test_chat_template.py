"""`with_thought_tokens`: the tokenizer's own template, and the run of thought tokens in it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from oracle import Oracle
from tiny_pair import QUESTIONS, Pair, with_template
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from softcot_peft import SoftCoTConfig, with_thought_tokens

N = 4
NEW = 6
Where = Literal["user_turn", "generation_prompt"]
PLACES: list[Where] = ["user_turn", "generation_prompt"]
Chat = list[dict[str, Any]]

USER = {"role": "user", "content": "How many legs?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Seven."}
AGAIN = {"role": "user", "content": "And dogs?"}
CHATS: dict[str, Chat] = {
    "one turn": [USER],
    "system prompt": [SYSTEM, USER],
    "several turns": [SYSTEM, USER, ANSWER, AGAIN],
    "answered": [USER, ANSWER],
    "empty turn": [{"role": "user", "content": ""}],
}

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
SYSTEM_FIRST = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}\
{% else %}{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}\
{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}\
{% if loop.index0 == 0 %}{% set content = system_message + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}\
{% if message['role'] == 'user' %}{{ bos_token or '' }}[INST] {{ content | trim }} [/INST]\
{% else %} {{ content | trim }} {{ eos_token }}{% endif %}{% endfor %}"""
PARTS = """\
{% for message in messages %}<|{{ message['role'] }}|>\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}\
{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>{% endif %}\
{% endfor %}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def config(**changes: object) -> SoftCoTConfig:
    defaults: dict[str, object] = {
        "assistant_model_name_or_path": "org/assistant",
        "thought_token": "<thought>",
        "num_thought_tokens": N,
    }
    return SoftCoTConfig(**(defaults | changes))  # type: ignore[arg-type]


def render(tokenizer: PreTrainedTokenizerBase, chat: Chat, **kwargs: Any) -> str:
    kwargs = {"add_generation_prompt": True} | kwargs
    return str(tokenizer.apply_chat_template(chat, tokenize=False, **kwargs))


# Where the run stands


@pytest.mark.parametrize(
    ("where", "chat", "expected"),
    [
        ("user_turn", "one turn", "<|user|>How many legs?{run}<|end|><|assistant|>"),
        ("user_turn", "system prompt", "<|system|>Be brief.<|end|><|user|>How many legs?{run}<|end|><|assistant|>"),
        (
            "user_turn",
            "several turns",
            "<|system|>Be brief.<|end|><|user|>How many legs?<|end|><|assistant|>Seven.<|end|>"
            "<|user|>And dogs?{run}<|end|><|assistant|>",
        ),
        (
            "user_turn",
            "answered",
            "<|user|>How many legs?{run}<|end|><|assistant|>Seven.<|end|><|assistant|>",
        ),
        ("user_turn", "empty turn", "<|user|>{run}<|end|><|assistant|>"),
        ("generation_prompt", "one turn", "<|user|>How many legs?<|end|><|assistant|>{run}"),
        (
            "generation_prompt",
            "several turns",
            "<|system|>Be brief.<|end|><|user|>How many legs?<|end|><|assistant|>Seven.<|end|>"
            "<|user|>And dogs?<|end|><|assistant|>{run}",
        ),
    ],
)
def test_the_run_stands_in_its_place(pair: Pair, where: Where, chat: str, expected: str) -> None:
    tokenizer = with_thought_tokens(pair.tokenizer, config(), where)
    assert render(tokenizer, CHATS[chat]) == expected.format(run="<thought>" * N)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("template", [None, CHATML, SYSTEM_FIRST], ids=["plain", "chatml", "system first"])
@pytest.mark.parametrize("where", PLACES)
def test_everything_but_the_run_is_as_before(
    pair: Pair, where: Where, template: str | None, chat: Chat, add_generation_prompt: bool
) -> None:
    original = with_template(pair.tokenizer, template or pair.tokenizer.chat_template)
    found = render(with_thought_tokens(original, config(), where), chat, add_generation_prompt=add_generation_prompt)
    run = "<thought>" * N
    runs = 1 if where == "user_turn" or add_generation_prompt else 0
    assert found.count(run) == runs
    assert found.replace(run, "") == render(original, chat, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize(
    "template",
    [
        "\n  Q: {{ messages[-1]['content'] }}\n### Response:\n\n",
        "  {% for message in messages %}{{ message['content'] }}{% endfor %} ",
        "{% for message in messages %}{{ message['content'] }}{% endfor %}\n",
    ],
)
@pytest.mark.parametrize("where", PLACES)
def test_white_space_at_the_template_s_ends_stays(pair: Pair, where: Where, template: str) -> None:
    original = with_template(pair.tokenizer, template)
    found = render(with_thought_tokens(original, config(), where), [USER])
    assert found.count("<thought>") == N
    assert found.replace("<thought>" * N, "") == render(original, [USER])


def test_training_and_inference_share_the_text_up_to_the_response(pair: Pair) -> None:
    tokenizer = with_thought_tokens(pair.tokenizer, config())
    chat = CHATS["several turns"]
    whole = render(tokenizer, [*chat, {"role": "assistant", "content": "Twelve."}], add_generation_prompt=False)
    assert whole == render(tokenizer, chat) + "Twelve.<|end|>"


def test_an_answer_that_is_continued_keeps_the_run_in_the_user_s_turn(pair: Pair) -> None:
    tokenizer = with_thought_tokens(pair.tokenizer, config())
    found = render(tokenizer, [USER, ANSWER], add_generation_prompt=False, continue_final_message=True)
    assert found == "<|user|>How many legs?" + "<thought>" * N + "<|end|><|assistant|>Seven."


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "text", "text": "How many "}, {"type": "text", "text": "legs?"}], "How many legs?{run}"),
        ([{"type": "text", "text": "Whose legs?"}, {"type": "image"}], "Whose legs?<image>{run}"),
        ([], "{run}"),
        ("How many legs?", "How many legs?{run}"),
    ],
)
def test_content_in_parts_gets_the_run_as_its_last_part(pair: Pair, content: Any, expected: str) -> None:
    tokenizer = with_thought_tokens(with_template(pair.tokenizer, PARTS), config())
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "Hm"}]},
        ANSWER,
        {"role": "user", "content": content},
    ]
    before = "<|user|>Hm<|end|><|assistant|>Seven.<|end|><|user|>"
    assert render(tokenizer, chat) == (before + expected + "<|end|><|assistant|>").format(run="<thought>" * N)


@pytest.mark.parametrize("chat", [[SYSTEM], [ANSWER]], ids=["system", "assistant"])
def test_without_a_user_s_turn_there_is_no_run_in_it(pair: Pair, chat: Chat) -> None:
    tokenizer = with_thought_tokens(pair.tokenizer, config(), "user_turn")
    assert render(tokenizer, chat) == render(pair.tokenizer, chat)
    tokenizer = with_thought_tokens(pair.tokenizer, config(), "generation_prompt")
    assert render(tokenizer, chat) == render(pair.tokenizer, chat) + "<thought>" * N


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("num", [0, 1, 9])
def test_another_number_can_be_asked_for(pair: Pair, where: Where, num: int) -> None:
    tokenizer = with_thought_tokens(pair.tokenizer, config(), where)
    found = render(tokenizer, [USER], num_thought_tokens=num)
    assert found.count("<thought>") == num
    assert found.replace("<thought>", "") == render(pair.tokenizer, [USER])
    ids = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False, num_thought_tokens=num)
    assert ids.count(tokenizer.convert_tokens_to_ids("<thought>")) == num


@pytest.mark.parametrize("token", ["<'th\"ought'>", "<\\n>", "<{{ x }}>", "<%}>"])
def test_any_special_token_can_be_the_thought_token(pair: Pair, token: str) -> None:
    original = copy.deepcopy(pair.tokenizer)
    original.add_tokens([token], special_tokens=True)
    for where in PLACES:
        tokenizer = with_thought_tokens(original, config(thought_token=token), where)
        ids = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == N
        assert render(tokenizer, [USER]).replace(token * N, "") == render(original, [USER])


# Texts around the run, and a place of the user's choosing

NASTY = [
    "'", '"', "\\", "\\'", "\\n", "\n", "\r\n", "\t", "\0", "\x7f", "\u2028", "{", "}", "{{ 1 + 1 }}", "{% if 1 %}",
    "%}", "{#", "#}", "{0}", "{token}", "{{{{", "' + 'x", "'}}{{'", "\\x41", "\\u0041", "\\N{BULLET}", "%s", "é",
    "思考", "😀", "e\u0301", "<b>&amp;</b>", "{%- generation -%}", "{{ raise_exception('x') }}", " ", "  x  ",
    "<|end|>", "# line", "{num_thought_tokens}", "{thoughts}", "a" * 1000,
]  # fmt: skip
ASKED = {"role": "user", "content": "Hint: {thoughts}; how many legs?"}


def check_texts(tokenizer: PreTrainedTokenizerBase, before: str, after: str, placeholder: str) -> None:
    """The texts stand around the run in all three places, letter by letter, and go with it."""
    run = before + "<thought>" * N + after
    for where in PLACES:
        found = with_thought_tokens(tokenizer, config(), where, before, after)
        plain = render(tokenizer, [USER])
        in_place = plain + run if where == "generation_prompt" else plain.replace("legs?", "legs?" + run)
        assert render(found, [USER]) == in_place
        assert render(found, [USER], num_thought_tokens=0) == plain
    found = with_thought_tokens(tokenizer, config(), "placeholder", before, after, placeholder)
    chat = [{"role": "user", "content": f"1 {placeholder} 2"}]
    assert render(found, chat) == f"<|user|>1 {run} 2<|end|><|assistant|>"
    assert render(found, chat, num_thought_tokens=0) == "<|user|>1  2<|end|><|assistant|>"


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_texts_are_literals(pair: Pair, text: str) -> None:
    check_texts(pair.tokenizer, text, text[::-1], text.strip() or "{thoughts}")
    tokenizer = with_thought_tokens(pair.tokenizer, config(), "user_turn", text, text)
    assert tokenizer.chat_template.isascii()
    ids = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    thought = tokenizer.convert_tokens_to_ids("<thought>")
    assert ids[ids.index(thought) :][:N] == [thought] * N
    assert ids.count(thought) == N


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=8), st.text(max_size=8), st.text("a{}%'\"\\\n\r x", min_size=1, max_size=5))
def test_any_text_is_a_literal(pair: Pair, before: str, after: str, placeholder: str) -> None:
    assume(f"1 {placeholder} 2".count(placeholder) == 1)
    check_texts(pair.tokenizer, before, after, placeholder)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{thoughts}", "{run}"),
        ("{thoughts} How many?", "{run} How many?"),
        (
            [{"type": "text", "text": "How {thoughts} many "}, {"type": "text", "text": "legs?"}],
            "How {run} many legs?",
        ),
        ([{"type": "image"}, {"type": "text", "text": "A{thoughts}B"}], "<image>A{run}B"),
    ],
    ids=str,
)
def test_the_run_stands_in_the_place_of_the_placeholder(pair: Pair, content: Any, expected: str) -> None:
    tokenizer = with_thought_tokens(with_template(pair.tokenizer, PARTS), config(), "placeholder", "[", "]")
    chat = [SYSTEM, {"role": "user", "content": "And{thoughts}?"}, {"role": "assistant", "content": "No {thoughts}."}]
    parts = [{"type": "text", "text": "And{thoughts}?"}]
    expected = expected.format(run="[" + "<thought>" * N + "]")
    for earlier in (chat, [SYSTEM, {"role": "user", "content": parts}, chat[2]]):
        copied = copy.deepcopy([*earlier, {"role": "user", "content": content}])
        assert render(tokenizer, copied) == (
            f"<|system|>Be brief.<|end|><|user|>And?<|end|><|assistant|>No {{thoughts}}.<|end|>"
            f"<|user|>{expected}<|end|><|assistant|>"
        )
        assert copied == [*earlier, {"role": "user", "content": content}]  # as they were


@pytest.mark.parametrize(
    ("content", "times"),
    [
        ("How many?", 0),
        ("{thoughts} and {thoughts}", 2),
        ([], 0),
        ([{"type": "text", "text": "{thou"}, {"type": "text", "text": "ghts}"}], 0),
        ([{"type": "text", "text": "{thoughts}"}, {"type": "text", "text": "{thoughts}"}], 2),
    ],
    ids=str,
)
def test_a_last_user_turn_must_hold_the_placeholder_once(pair: Pair, content: Any, times: int) -> None:
    tokenizer = with_thought_tokens(with_template(pair.tokenizer, PARTS), config(), "placeholder")
    for rest in ([], [ANSWER]):
        message = rf"last user message must contain the placeholder '{{thoughts}}' once, but contains it {times} times"
        with pytest.raises(TemplateError, match=message):
            render(tokenizer, [ASKED, ANSWER, {"role": "user", "content": content}, *rest])
    assert render(tokenizer, [SYSTEM]) == "<|system|>Be brief.<|end|><|assistant|>"  # no user's turn


def test_training_rows_have_the_placeholder_s_run_too(pair: Pair) -> None:
    tokenizer = with_thought_tokens(pair.tokenizer, config(), "placeholder", "<<", ">>")
    prompt = render(tokenizer, [ASKED])
    assert prompt == "<|user|>Hint: <<" + "<thought>" * N + ">>; how many legs?<|end|><|assistant|>"
    assert render(tokenizer, [ASKED, ANSWER], add_generation_prompt=False) == prompt + "Seven.<|end|>"
    continued = render(tokenizer, [ASKED, ANSWER], add_generation_prompt=False, continue_final_message=True)
    assert continued == prompt + "Seven."


def test_the_model_generates_the_oracle_s_tokens_between_texts(pair: Pair) -> None:
    model = pair.model(thought_token="<thought>", placement="thought_token")
    tokenizer = with_thought_tokens(pair.tokenizer, model.peft_config["default"], "placeholder", "\n[", "]\n")
    oracle, thought = Oracle.of(model, pair.base, pair.assistant, N), tokenizer.convert_tokens_to_ids("<thought>")
    ids = tokenizer.apply_chat_template([ASKED], add_generation_prompt=True, return_dict=False)
    start = ids.index(thought)
    assert tokenizer.decode(ids[:start]).endswith("Hint: \n[")
    found = model.generate(torch.tensor([ids]), max_new_tokens=NEW)[0].tolist()
    assert found == ids + oracle.generate(ids[:start], NEW, after=ids[start + N :])


def test_every_template_of_a_dict_gets_the_run(pair: Pair) -> None:
    templates = {"default": pair.tokenizer.chat_template, "chatml": CHATML}
    original = with_template(pair.tokenizer, templates)
    tokenizer = with_thought_tokens(original, config())
    assert tokenizer.chat_template.keys() == templates.keys()
    for name in templates:
        found = render(tokenizer, [USER], chat_template=name)
        assert found.replace("<thought>" * N, "") == render(original, [USER], chat_template=name)
        assert found.count("<thought>") == N


# The copy


@pytest.mark.parametrize("template", [None, {"default": CHATML, "other": PARTS}], ids=["one", "several"])
def test_the_original_stays_as_it_is(pair: Pair, template: Any) -> None:
    original = with_template(pair.tokenizer, template or pair.tokenizer.chat_template)
    before = copy.deepcopy(original.chat_template), original.get_vocab(), render(original, [USER])
    tokenizer = with_thought_tokens(original, config())
    assert tokenizer is not original
    assert type(tokenizer) is type(original)
    assert (original.chat_template, original.get_vocab(), render(original, [USER])) == before
    assert tokenizer.get_vocab() == original.get_vocab()
    assert tokenizer(QUESTIONS)["input_ids"] == original(QUESTIONS)["input_ids"]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("template", [None, {"default": CHATML, "other": PARTS}], ids=["one", "several"])
def test_the_run_survives_saving_and_loading(pair: Pair, tmp_path: Path, template: Any, where: Where) -> None:
    original = with_template(pair.tokenizer, template or pair.tokenizer.chat_template)
    tokenizer = with_thought_tokens(original, config(), where)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for name in template or [None]:
        for chat in CHATS.values():
            found = render(loaded, chat, chat_template=name)
            assert found == render(tokenizer, chat, chat_template=name)
            assert "<thought>" * N in found


# The ids, and what the model makes of them


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("num", [None, 2])
def test_the_model_generates_the_oracle_s_tokens(pair: Pair, where: Where, num: int | None) -> None:
    model = pair.model(thought_token="<thought>", placement="thought_token")
    tokenizer = with_thought_tokens(pair.tokenizer, model.peft_config["default"], where)
    oracle = Oracle.of(model, pair.base, pair.assistant, num or N)
    thought = tokenizer.convert_tokens_to_ids("<thought>")
    override = {} if num is None else {"num_thought_tokens": num}
    for chat in CHATS.values():
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **override)
        start = ids.index(thought)
        before, run, after = ids[:start], ids[start : start + (num or N)], ids[start + (num or N) :]
        assert run == [thought] * (num or N)
        assert thought not in after
        assert bool(after) == (where == "user_turn")
        found = model.generate(torch.tensor([ids]), max_new_tokens=NEW)[0].tolist()
        assert found == ids + oracle.generate(before, NEW, after=after)


@pytest.mark.parametrize("where", PLACES)
def test_chats_of_different_lengths_go_into_one_batch(pair: Pair, where: Where) -> None:
    model = pair.model(thought_token="<thought>", placement="thought_token")
    tokenizer = with_thought_tokens(pair.tokenizer, model.peft_config["default"], where)
    chats = list(CHATS.values())
    options = {"add_generation_prompt": True, "return_dict": True}
    batch = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", **options)
    together = model.generate(**batch, max_new_tokens=NEW, min_new_tokens=NEW)[:, -NEW:].tolist()
    for chat, found in zip(chats, together, strict=True):
        one = tokenizer.apply_chat_template([chat], return_tensors="pt", **options)
        assert found == model.generate(**one, max_new_tokens=NEW, min_new_tokens=NEW)[0, -NEW:].tolist()


# Errors


def test_another_place_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"`where` must be 'user_turn', .* or 'placeholder', got 'system'"):
        with_thought_tokens(pair.tokenizer, config(), "system")  # type: ignore[arg-type]


def test_a_config_without_a_thought_token_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"`thought_token` must be set in the config, got None\. Name a token"):
        with_thought_tokens(pair.tokenizer, config(thought_token=None))


def test_a_tokenizer_without_a_template_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"`tokenizer` must have a chat template, got none\. Set `tokenizer\.chat_"):
        with_thought_tokens(with_template(pair.tokenizer, None), config())


@pytest.mark.parametrize("token", ["<unheard-of>", "Ġmany", "two words"])
def test_a_token_that_is_not_read_back_is_refused(pair: Pair, token: str) -> None:
    with pytest.raises(ValueError, match=r"`thought_token` must be one token of the tokenizer.*special token") as info:
        with_thought_tokens(pair.tokenizer, config(thought_token=token))
    assert repr(token) in str(info.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"before": None}, TypeError, "`before` must be a string, got NoneType"),
        ({"after": ["]"]}, TypeError, "`after` must be a string, got list"),
        ({"where": "placeholder", "placeholder": 3}, TypeError, "`placeholder` must be a string, got int"),
        ({"before": "<thought>"}, ValueError, r"`before` must not contain the thought token '<thought>', got '<thou"),
        ({"after": "a<thought>\n"}, ValueError, r"`after` must not contain the thought token '<thought>', got 'a<t"),
        ({"where": "placeholder", "placeholder": "<thought>"}, ValueError, "`placeholder` must not contain the thou"),
        ({"where": "placeholder", "placeholder": ""}, ValueError, "`placeholder` must be a text .* got ''"),
        ({"placeholder": "HERE"}, ValueError, "`placeholder` must be left out with `where='user_turn'`, got 'HERE'"),
        ({"before": "\ud800"}, ValueError, r"`before` must be text that UTF-8 can encode, got '\\ud800'"),
    ],
)
def test_texts_that_cannot_be_meant_are_refused(
    pair: Pair, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        with_thought_tokens(pair.tokenizer, config(), **options)


def letters(*, special: bool) -> PreTrainedTokenizerBase:
    """A tokenizer that has "cc" as a token, which is special or the result of a merge."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "cc": 3, "bcc": 4}, [("c", "c"), ("b", "cc")]))
    if special:
        tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))
        tokenizer.add_special_tokens(["cc"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=PARTS)


@pytest.mark.parametrize(
    ("special", "options"),
    [
        (True, {"before": "c", "after": "c"}),  # one more
        (False, {"before": "b"}),  # merged with the first
    ],
)
def test_neighbours_that_change_the_run_are_refused(special: bool, options: dict[str, str]) -> None:
    tokenizer = letters(special=special)
    with_thought_tokens(tokenizer, config(thought_token="cc"))
    with pytest.raises(ValueError, match=r"`before` and `after` must leave the run as it is, but \d of 'cc' are not"):
        with_thought_tokens(tokenizer, config(thought_token="cc"), **options)


def test_the_default_placeholder_is_no_obstacle_where_it_is_not_used(pair: Pair) -> None:
    original = copy.deepcopy(pair.tokenizer)
    original.add_tokens(["{thoughts}"], special_tokens=True)
    tokenizer = with_thought_tokens(original, config(thought_token="{thoughts}"))
    assert render(tokenizer, [USER]) == "<|user|>How many legs?" + "{thoughts}" * N + "<|end|><|assistant|>"
