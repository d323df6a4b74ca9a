"""What the assistant reads: the prompt's ids or its text, through templates, padded, ending in thought positions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import reader_of
from oracle import Oracle
from peft import PeftModel, get_peft_model
from tiny_pair import QUESTIONS, Pair, make_assistant_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from softcot_peft import SoftCoTConfig, use_assistant

N = 4
UNK, PAD, BOS, EOS = 0, 1, 2, 3  # of the assistant's tokenizer
TWIN_EOS = 1  # of the base's tokenizer, which the twin has too
TEXTS = [QUESTIONS[1], QUESTIONS[0], "Seven?"]  # of different lengths
pytestmark = pytest.mark.usefixtures("nothing_given")

TEMPLATE = "Think in {num_thought_tokens} steps: {prompt} Go on."


@dataclass
class Reading:
    """An assistant whose input is watched.

    Args:
        name: By which configs refer to it.
        tokenizer: Its tokenizer.
        inputs: Its arguments, one dict per pass.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    inputs: list[dict[str, Tensor]] = field(default_factory=list)

    def rows(self) -> list[list[int]]:
        """The attended ids of every row of the last pass."""
        last = self.inputs[-1]
        return [ids[mask == 1].tolist() for ids, mask in zip(last["input_ids"], last["attention_mask"], strict=True)]


def watched(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Reading:
    model = AutoModelForCausalLM.from_pretrained(folder)
    reading = Reading(use_assistant(model, tokenizer, name="watched"), tokenizer)

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        reading.inputs.append({name: kwargs[name] for name in ("input_ids", "attention_mask", "position_ids")})

    model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    return reading


@pytest.fixture
def other(pair: Pair) -> Reading:
    """An assistant with a tokenizer of its own: lower-casing WordPiece that puts [BOS] first."""
    return watched(pair.assistant, make_assistant_tokenizer())


@pytest.fixture
def chat(pair: Pair) -> Reading:
    """The same with a chat template."""
    return watched(pair.assistant, make_assistant_tokenizer(chat=True))


@pytest.fixture
def twin(pair: Pair) -> Reading:
    """An assistant with the base's tokenizer."""
    return watched(pair.twin, AutoTokenizer.from_pretrained(pair.twin))


def attach(pair: Pair, reading: Reading, **changes: object) -> PeftModel:
    return pair.model(assistant_model_name_or_path=reading.name, **changes)


def read(model: nn.Module, reading: Reading, batch: dict[str, Tensor]) -> list[list[int]]:
    """What the assistant reads for a batch; the same for `forward` and `generate`, in one pass each."""
    reading.inputs.clear()
    model(**batch, logits_to_keep=1)
    in_forward = reading.rows()
    model.generate(**batch, max_new_tokens=2)
    assert reading.rows() == in_forward
    assert len(reading.inputs) == 2
    return in_forward


# Ids or text


@pytest.mark.parametrize("shares", [None, True])
def test_a_shared_tokenizer_means_the_prompt_s_own_ids(pair: Pair, twin: Reading, shares: bool | None) -> None:
    model = attach(pair, twin, assistant_shares_tokenizer=shares)
    texts = ["<|system|>Be brief.<|end|><|user|>" + text + "<|end|><|assistant|>" for text in TEXTS]
    expected = [row + [TWIN_EOS] * N for row in pair.rows(texts)]
    assert read(model, twin, pair.batch(texts)) == expected


def test_a_shared_tokenizer_can_be_left_aside(pair: Pair, twin: Reading) -> None:
    model = attach(pair, twin, assistant_shares_tokenizer=False)
    prompts = ["<|user|>" + text + "<|end|>" for text in TEXTS]
    assert read(model, twin, pair.batch(prompts)) == [row + [TWIN_EOS] * N for row in pair.rows(TEXTS)]


def test_shared_ids_need_no_tokenizer_of_the_base(pair: Pair, twin: Reading) -> None:
    base = pair.load_base()
    base.config._name_or_path = base.name_or_path = ""
    config = pair.config(assistant_model_name_or_path=twin.name, assistant_shares_tokenizer=True)
    model = get_peft_model(base, config).eval()
    assert read(model, twin, pair.batch(TEXTS)) == [row + [TWIN_EOS] * N for row in pair.rows(TEXTS)]


@pytest.mark.parametrize("shares", [None, False])
def test_other_tokenizers_read_the_text_without_the_base_s_special_tokens(
    pair: Pair, other: Reading, shares: bool | None
) -> None:
    model = attach(pair, other, assistant_shares_tokenizer=shares)
    prompts = ["<|user|>" + text + "<|end|><|assistant|>" for text in TEXTS]
    expected = [other.tokenizer(text)["input_ids"] + [UNK] * N for text in TEXTS]
    assert all(row[0] == BOS for row in expected)
    assert read(model, other, pair.batch(prompts)) == expected


def test_text_and_ids_give_other_thoughts(pair: Pair) -> None:
    prompts = pair.rows(["<|user|>" + text + "<|end|>" for text in TEXTS])
    for shares in (None, False):
        model = pair.model(assistant_model_name_or_path=str(pair.twin), assistant_shares_tokenizer=shares)
        oracle = Oracle.of(model, pair.base, pair.twin, N, same_ids=shares is None)
        for prompt in prompts:
            found = model.generate(torch.tensor([prompt]), max_new_tokens=5)[0, len(prompt) :].tolist()
            assert found == oracle.generate(prompt, 5)
            oracle.same_ids = not oracle.same_ids
            assert found != oracle.generate(prompt, 5)
            oracle.same_ids = not oracle.same_ids


def test_only_what_stands_before_the_first_label_is_read(pair: Pair, other: Reading) -> None:
    model = attach(pair, other)
    prompts, answers = pair.rows(TEXTS), pair.rows(["Twelve.", "How many?", "Dogs"])
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    model(
        input_ids=nn.utils.rnn.pad_sequence(rows, batch_first=True),
        attention_mask=nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        labels=nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
    )
    assert other.rows() == [other.tokenizer(text)["input_ids"] + [UNK] * N for text in TEXTS]


def test_only_what_stands_before_the_run_is_read(pair: Pair, other: Reading) -> None:
    model = attach(pair, other, thought_token="<thought>")
    prompts = [text + "<thought>" * 3 + "<|end|> seven" for text in TEXTS]
    expected = [other.tokenizer(text)["input_ids"] + [UNK] * 3 for text in TEXTS]
    assert read(model, other, pair.batch(prompts)) == expected


def test_a_prompt_without_text_is_read_as_an_empty_one(pair: Pair, other: Reading) -> None:
    model = attach(pair, other)
    assert read(model, other, pair.batch(["<|user|>", TEXTS[0]])) == [
        [BOS] + [UNK] * N,
        other.tokenizer(TEXTS[0])["input_ids"] + [UNK] * N,
    ]


@pytest.mark.parametrize("spelled", ["[EOS]", "[BOS]", "[PAD]"])
@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("chats", [False, True])
def test_text_that_spells_a_special_token_does_not_become_it(
    pair: Pair, other: Reading, chats: bool, template: str | None, spelled: str
) -> None:
    reading = watched(pair.assistant, make_assistant_tokenizer(chat=chats))
    model = attach(pair, reading, assistant_prompt=template)
    token = reading.tokenizer.convert_tokens_to_ids(spelled)
    texts = [f"How many {spelled}{spelled} legs?", f"{spelled}", "How many legs?"]
    assert token in reading.tokenizer(texts[0])["input_ids"]  # it would, if it were simply tokenized
    for text, row in zip(texts, read(model, reading, pair.batch(texts)), strict=True):
        special = [i for i in row[:-N] if i in (PAD, BOS, EOS)]
        assert special == ([] if chats and template else [BOS])  # what the tokenizer puts there itself
        words = reading.tokenizer.decode(row, skip_special_tokens=True)
        assert ("how many" in words) == ("How many" in text)  # the rest of the prompt is read
        assert ("legs" in words) == ("legs" in text)


# Templates


@pytest.mark.parametrize("chats", [False, True])
def test_the_template_wraps_the_prompt(pair: Pair, chats: bool) -> None:
    reading = watched(pair.assistant, make_assistant_tokenizer(chat=chats))
    model = attach(pair, reading, assistant_prompt=TEMPLATE)
    expected = []
    for text in TEXTS:
        content = f"Think in {N} steps: {text} Go on."
        if chats:
            message = [{"role": "user", "content": content}]
            ids = reading.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        else:
            ids = reading.tokenizer(content)["input_ids"]
        expected.append(ids + [UNK] * N)
    assert read(model, reading, pair.batch(TEXTS)) == expected


@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize("spelled", ["", "[PAD]"])
def test_the_template_s_own_special_tokens_are_tokens(pair: Pair, chats: bool, spelled: str) -> None:
    reading = watched(pair.assistant, make_assistant_tokenizer(chat=chats))
    model = attach(pair, reading, assistant_prompt="[EOS] {prompt} [EOS]")
    texts = [f"How many {spelled} legs?", "nine"]
    first, second = read(model, reading, pair.batch(texts))
    for row in (second, first) if chats or not spelled else (second,):
        assert row.count(EOS) == 2
    assert PAD not in first


def test_the_chat_template_of_a_loaded_assistant_is_used(pair: Pair) -> None:
    changes = {"assistant_model_name_or_path": str(pair.chat_assistant), "assistant_prompt": TEMPLATE}
    model = pair.model(**changes)
    tokenizer = AutoTokenizer.from_pretrained(pair.chat_assistant)

    class ChatOracle(Oracle):
        def assistant_ids(self, prompt: list[int]) -> list[int]:
            text = f"Think in {N} steps: {pair.tokenizer.decode(prompt)} Go on."
            message = [{"role": "user", "content": text}]
            return list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))

    oracle = ChatOracle.of(model, pair.base, pair.chat_assistant, N)
    plain = Oracle.of(model, pair.base, pair.chat_assistant, N)
    for row in pair.rows(TEXTS):
        found = model.generate(torch.tensor([row]), max_new_tokens=5)[0, len(row) :].tolist()
        assert found == oracle.generate(row, 5)
        assert found != plain.generate(row, 5)


def test_without_a_template_the_chat_template_is_not_used(pair: Pair, chat: Reading) -> None:
    expected = [chat.tokenizer(text)["input_ids"] + [UNK] * N for text in TEXTS]
    assert read(attach(pair, chat), chat, pair.batch(TEXTS)) == expected


def test_a_template_reads_text_though_the_tokenizer_is_shared(pair: Pair, twin: Reading) -> None:
    # The twin has the base's chat template, so the prompt stands in a user turn of it.
    model = attach(pair, twin, assistant_prompt="{prompt}!")
    prompts = ["<|system|>" + text for text in TEXTS]
    turns = [f"<|user|>{text}!<|end|><|assistant|>" for text in TEXTS]
    assert read(model, twin, pair.batch(prompts)) == [row + [TWIN_EOS] * N for row in pair.rows(turns)]


@pytest.mark.parametrize(
    "text",
    [
        "{prompt}",
        "{num_thought_tokens}",
        "{} {0} {a.b} %s %(x)d \\1 \\g<0>",
        "{{ messages }} {% if x %}",
        "}{",
        "\x01 a",
    ],
)
@pytest.mark.parametrize("chats", [False, True])
def test_braces_in_the_prompt_are_text(pair: Pair, chats: bool, text: str) -> None:
    reading = watched(pair.assistant, _letters(chats))
    model = attach(pair, reading, assistant_prompt="A {prompt} B")
    content = "[user] A " + text + " B [assistant] " if chats else "A " + text + " B"
    assert read(model, reading, pair.batch([text])) == [_spell(content) + [0] * N]


def _letters(chats: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that spells, so that nothing of a text is hidden behind unknown words."""
    letters = {"[UNK]": 0, **{chr(code): code for code in range(1, 127)}}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    template = make_assistant_tokenizer(chat=True).chat_template if chats else None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", chat_template=template)


def _spell(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("scored", "num"), [(True, 6), (False, 2)])
def test_the_template_names_the_number_of_thoughts_of_this_pass(
    pair: Pair, other: Reading, training: bool, scored: bool, num: int
) -> None:
    changes = {"num_thought_tokens": 6, "inference_num_thought_tokens": 2, "assistant_prompt": TEMPLATE}
    model = attach(pair, other, **changes).train(training)
    batch = pair.batch(TEXTS[:1])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = 7
    if scored:
        model(**batch, labels=labels)
    else:
        model(**batch, logits_to_keep=1)
    before = pair.tokenizer.decode(batch["input_ids"][0, : -1 if scored else None])
    expected = other.tokenizer(TEMPLATE.format(num_thought_tokens=num, prompt=before))["input_ids"]
    assert other.rows() == [expected + [UNK] * num]


def test_the_template_names_the_length_of_the_run(pair: Pair, other: Reading) -> None:
    model = attach(pair, other, thought_token="<thought>", assistant_prompt="{num_thought_tokens}: {prompt}")
    for num in (1, 9):
        found = read(model, other, pair.batch([TEXTS[0] + "<thought>" * num]))
        assert found == [other.tokenizer(f"{num}: {TEXTS[0]}")["input_ids"] + [UNK] * num]


# Thought positions


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reads", ["ids", "text", "template"])
def test_rows_of_a_batch_are_read_as_they_are_alone(pair: Pair, twin: Reading, reads: str, side: str) -> None:
    changes = {
        "ids": {},
        "text": {"assistant_shares_tokenizer": False},
        "template": {"assistant_prompt": TEMPLATE},
    }
    model = attach(pair, twin, **changes[reads])
    together = read(model, twin, pair.batch(TEXTS, side))
    for last in twin.inputs:  # by `forward` and by `generate`
        mask = last["attention_mask"]
        assert (last["input_ids"][:, -N:] == TWIN_EOS).all()
        assert (mask[:, -N:] == 1).all()
        assert (mask.diff(dim=1) >= 0).all()  # left-padded
        assert mask.sum(1).max() == mask.shape[1]  # and no wider than needed
        counted = [torch.arange(int(row.sum())) for row in mask]
        for positions, row, expected in zip(last["position_ids"], mask, counted, strict=True):
            assert positions[row == 1].tolist() == expected.tolist()
    alone = [read(model, twin, pair.batch([text]))[0] for text in TEXTS]
    assert together == alone
    assert len({len(row) for row in alone}) == 3


# the logits of the last prompt tokens are looked at, and no others
@pytest.mark.filterwarnings("ignore:Without `labels`, thoughts stand after:UserWarning")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_thought(pair: Pair, side: str) -> None:
    model = pair.model()
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    batch = pair.batch(TEXTS, side)
    logits = model(**batch).logits  # all rows, since the last tokens of right-padded prompts stand apart
    for row, mask, ids in zip(logits, batch["attention_mask"], pair.rows(TEXTS), strict=True):
        torch.testing.assert_close(row[mask == 1][-1], oracle.logits(ids, [])[-1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"unk_token": "[UNK]", "eos_token": "[EOS]", "pad_token": "[PAD]"}, UNK),
        ({"eos_token": "[EOS]", "pad_token": "[PAD]"}, EOS),
        ({"pad_token": "[PAD]"}, PAD),
    ],
)
def test_the_thought_positions_hold_unk_else_eos_else_pad(pair: Pair, tokens: dict[str, str], expected: int) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_assistant_tokenizer()._tokenizer, **tokens)
    reading = watched(pair.assistant, tokenizer)
    rows = read(attach(pair, reading), reading, pair.batch(TEXTS))
    assert [row[-N:] for row in rows] == [[expected] * N] * len(TEXTS)
    assert all(row[-N - 1] != expected for row in rows)


def test_a_tokenizer_without_any_of_them_needs_the_token_named(pair: Pair) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_assistant_tokenizer()._tokenizer)
    reading = watched(pair.assistant, tokenizer)
    with pytest.raises(ValueError, match=r"`assistant_thought_token` must be given.*'watched' has no unk, eos or pad"):
        attach(pair, reading)
    rows = read(attach(pair, reading, assistant_thought_token="legs"), reading, pair.batch(TEXTS))
    assert [row[-N:] for row in rows] == [[tokenizer.get_vocab()["legs"]] * N] * len(TEXTS)


def test_the_thought_positions_hold_the_token_of_the_config(pair: Pair, other: Reading) -> None:
    rows = read(attach(pair, other, assistant_thought_token="[PAD]"), other, pair.batch(TEXTS))
    assert [row[-N:] for row in rows] == [[PAD] * N] * len(TEXTS)  # attended, though it is the pad token


# The base's tokenizer


def test_the_base_s_tokenizer_is_taken_from_where_the_config_says(pair: Pair, other: Reading, tmp_path: Path) -> None:
    base = pair.load_base()
    base.save_pretrained(tmp_path)  # without its tokenizer
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = pair.config(assistant_model_name_or_path=other.name, tokenizer_name_or_path=str(pair.base))
    model = get_peft_model(base, config).eval()
    expected = [other.tokenizer(text)["input_ids"] + [UNK] * N for text in TEXTS]
    assert read(model, other, pair.batch(TEXTS)) == expected


def test_the_config_s_tokenizer_goes_before_the_base_s_own(pair: Pair, other: Reading, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    tokenizer.add_tokens(["Seven?"], special_tokens=True)  # one more token to skip
    tokenizer.save_pretrained(tmp_path)
    base = pair.load_base()
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = pair.config(assistant_model_name_or_path=other.name, tokenizer_name_or_path=str(tmp_path))
    ids = dict(tokenizer(["Seven? How"], return_tensors="pt"))
    assert ids["input_ids"].max() == len(tokenizer) - 1
    found = read(get_peft_model(base, config).eval(), other, ids)
    assert found == [other.tokenizer(" How")["input_ids"] + [UNK] * N]


def test_a_base_made_in_memory_has_the_tokenizer_that_the_adapter_names(
    pair: Pair, other: Reading, tmp_path: Path
) -> None:
    attach(pair, other).save_pretrained(tmp_path)  # on the base with a name
    base = pair.load_base()
    base.config._name_or_path = base.name_or_path = ""
    model = PeftModel.from_pretrained(base, tmp_path).eval()
    expected = [other.tokenizer(text)["input_ids"] + [UNK] * N for text in TEXTS]
    assert read(model, other, pair.batch(TEXTS)) == expected


# The caller's own input


def test_the_caller_s_own_input_is_read_as_it_is(pair: Pair, other: Reading) -> None:
    model = attach(pair, other)
    ids = torch.tensor([[1, 1, 9, 8, 0, 7, 0, 7], [5, 6, 7, 8, 9, 10, 11, 12], [1, 9, 9, 9, 0, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8, [0, 1, 1, 1, 1, 1, 1, 1]])
    own = {"assistant_input_ids": ids, "assistant_attention_mask": mask}
    model(**pair.batch(TEXTS), **own, logits_to_keep=1)
    model.generate(**pair.batch(TEXTS), **own, max_new_tokens=2)
    model.generate(**pair.batch(TEXTS), assistant_input_ids=ids, max_new_tokens=2)
    assert [torch.equal(seen["input_ids"], ids) for seen in other.inputs] == [True] * 3
    assert [seen["attention_mask"].tolist() for seen in other.inputs] == [mask.tolist()] * 2 + [[[1] * 8] * 3]


def test_the_caller_s_own_input_equal_to_the_reader_s_gives_the_same(pair: Pair, other: Reading) -> None:
    model = attach(pair, other)
    expected = model.generate(**pair.batch(TEXTS), max_new_tokens=5)
    seen = other.inputs[-1]
    own = {"assistant_input_ids": seen["input_ids"], "assistant_attention_mask": seen["attention_mask"]}
    assert torch.equal(model.generate(**pair.batch(TEXTS), **own, max_new_tokens=5), expected)
    changed = own | {"assistant_input_ids": own["assistant_input_ids"].flip(0)}
    assert not torch.equal(model.generate(**pair.batch(TEXTS), **changed, max_new_tokens=5), expected)


# The question alone, and a lead-in


def read_text(model: nn.Module, text: str, tokenizer: PreTrainedTokenizerBase, num: int = 4) -> str:
    """What the assistant reads for a prompt, decoded, without the thought positions."""
    reader, ids = reader_of(model), torch.tensor([tokenizer(text)["input_ids"]])
    found, mask = reader.read(ids, torch.ones_like(ids), num)
    return reader.assistant.tokenizer.decode(found[0][mask[0] == 1][:-num], skip_special_tokens=True)


def test_the_assistant_reads_what_stands_between_two_delimiters(pair: Pair) -> None:
    prompt = "How many legs? Tom has seven dogs. What is left?"
    model = pair.model(assistant_prompt_between=("How many legs?", "What is left?"))
    assert read_text(model, prompt, pair.tokenizer) == read_text(pair.model(), " Tom has seven dogs. ", pair.tokenizer)
    for wrong, count in ((prompt.replace("What", "How"), 0), (prompt + " What is left?", 2)):
        ids = torch.tensor([pair.tokenizer(wrong)["input_ids"]])
        with pytest.raises(ValueError, match=rf"'What is left\?' occurs {count} times in row 0"):
            model.generate(ids, max_new_tokens=1)
    swapped = pair.model(assistant_prompt_between=("What is left?", "How many legs?"))
    with pytest.raises(ValueError, match="must name what stands before the question first"):
        swapped.generate(torch.tensor([pair.tokenizer(prompt)["input_ids"]]), max_new_tokens=1)


@pytest.mark.parametrize("chats", [False, True])
def test_a_lead_in_stands_before_the_thought_positions(pair: Pair, chats: bool) -> None:
    fields = (
        {"assistant_model_name_or_path": str(pair.chat_assistant), "assistant_prompt": "{prompt}"} if chats else {}
    )
    plain, led = pair.model(**fields), pair.model(**fields, assistant_prefix=" seven {num_thought_tokens} dogs")
    text = "What is nine less four?"
    before, after = (read_text(model, text, pair.tokenizer) for model in (plain, led))
    assert after.startswith(before)
    ending = reader_of(led).assistant.tokenizer
    assert (
        after[len(before) :].split()
        == ending.decode(
            ending(" seven 4 dogs", add_special_tokens=False)["input_ids"], skip_special_tokens=True
        ).split()
    )


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"assistant_prompt_between": "ab"}, TypeError, "must be two strings, got 'ab'"),
        ({"assistant_prompt_between": ["a"]}, TypeError, r"must be two strings, got \['a'\]"),
        ({"assistant_prompt_between": ["a", ""]}, ValueError, r"must be two texts, got \['a', ''\]"),
        ({"assistant_prefix": "a", "assistant_shares_tokenizer": True}, ValueError, "`assistant_prefix` changes the"),
        ({"assistant_prefix": 3}, TypeError, "`assistant_prefix` must be a string, got int"),
    ],
)
def test_what_the_assistant_reads_is_checked(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SoftCoTConfig(assistant_model_name_or_path="x", **fields)
