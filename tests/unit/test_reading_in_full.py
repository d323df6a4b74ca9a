"""The assistant reads the whole prompt, or an error or a warning says what it cannot read: every step of the way."""

from __future__ import annotations

import copy
import datetime as clock
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import generated
from helpers import given_assistants, given_tokenizers, reader_of
from oracle import Oracle
from peft import PeftModel, get_peft_model
from project_files import rewrite
from tiny_pair import BASE_TEMPLATE, QUESTIONS, Pair, make_assistant_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import chat_template_utils

from softcot_peft import compute_thoughts, use_assistant, use_thoughts, use_tokenizer

pytestmark = pytest.mark.usefixtures("nothing_given")

N, NEW = 4, 5
LOSES = "has no tokens for"


@pytest.fixture
def assistant(pair: Pair, tmp_path: Path) -> Path:
    """A copy of the assistant with a chat template, to be changed."""
    return Path(shutil.copytree(pair.chat_assistant, tmp_path / "assistant"))


def read(model: nn.Module, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What the assistant reads for each text, without the thought positions."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = reader_of(model).read(batch["input_ids"], batch["attention_mask"], N)
    return [row[kept == 1].tolist()[:-N] for row, kept in zip(ids, mask, strict=True)]


def words(model: nn.Module, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    own = reader_of(model).assistant.tokenizer
    return [own.decode(row, skip_special_tokens=True) for row in read(model, texts, tokenizer)]


def answers(model: nn.Module, rows: list[list[int]]) -> list[list[int]]:
    return [model.generate(torch.tensor([row]), max_new_tokens=NEW)[0, len(row) :].tolist() for row in rows]


def extended(pair: Pair, *tokens: str, special: bool = False) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The base and its tokenizer with tokens added in memory, and rows of the embedding to spare."""
    tokenizer, base = AutoTokenizer.from_pretrained(pair.base), pair.load_base()
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    torch.manual_seed(1)
    base.resize_token_embeddings(len(tokenizer) + 7, mean_resizing=False)
    return tokenizer, base


# The base's tokenizer in memory


def test_a_tokenizer_in_memory_is_used_under_the_base_s_name(pair: Pair, tmp_path: Path) -> None:
    tokenizer, base = extended(pair, "elephants", "legs?")
    assert use_tokenizer(tokenizer) == str(pair.base)
    model = get_peft_model(base, pair.config()).eval()
    text = "How many legs? Seven elephants"
    assert len(pair.rows([text])[0]) > len(tokenizer(text)["input_ids"])
    expected = reader_of(model).assistant.tokenizer(text)["input_ids"]
    assert read(model, [text], tokenizer) == [expected]
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    oracle.base.resize_token_embeddings(len(tokenizer) + 7)
    oracle.base.get_input_embeddings().weight.data = base.get_input_embeddings().weight.data
    oracle.base.lm_head.weight.data = base.lm_head.weight.data
    oracle.base_tokenizer = tokenizer
    rows = tokenizer([text, "elephants"])["input_ids"]
    assert answers(model, rows) == [oracle.generate(row, NEW) for row in rows]


@pytest.mark.parametrize("where", ["base", "config", "adapter"])
def test_a_tokenizer_in_memory_is_found_by_any_name(pair: Pair, tmp_path: Path, where: str) -> None:
    tokenizer, base = extended(pair, "elephants")
    base.config._name_or_path = base.name_or_path = "in memory" if where == "base" else ""
    use_tokenizer(tokenizer, name="in memory")
    changes = {"tokenizer_name_or_path": "in memory"} if where == "config" else {}
    if where == "adapter":  # that was trained on a base with this name
        pair.model().save_pretrained(tmp_path / "adapter")
        rewrite(tmp_path / "adapter", base_model_name_or_path="in memory")
        model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    else:
        model = get_peft_model(base, pair.config(**changes)).eval()
    assert read(model, ["elephants"], tokenizer) == [reader_of(model).assistant.tokenizer("elephants")["input_ids"]]
    if where == "config":  # and an adapter that names it says what to do where there is none
        model.save_pretrained(tmp_path)
        given_tokenizers().clear()
        with pytest.raises(ValueError, match=r"`tokenizer_name_or_path`: no .* 'in memory'.*use_tokenizer\(tokenizer"):
            PeftModel.from_pretrained(base.__class__(base.config), tmp_path)
        use_tokenizer(tokenizer, name="in memory")
        PeftModel.from_pretrained(base.__class__(base.config), tmp_path)


def test_adapters_keep_the_tokenizer_they_were_attached_with(pair: Pair) -> None:
    tokenizer, base = extended(pair, "elephants")
    use_tokenizer(tokenizer)
    model = get_peft_model(base, pair.config()).eval()
    use_tokenizer(AutoTokenizer.from_pretrained(pair.base))
    read(model, ["elephants"], tokenizer)
    tokenizer.add_tokens(["mice"])  # later, to the same one
    read(model, ["mice"], tokenizer)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert read(copied, ["mice elephants"], tokenizer) == read(model, ["mice elephants"], tokenizer)


@pytest.mark.parametrize("tokenizer", [None, 5, "x"])
def test_use_tokenizer_takes_tokenizers_only(tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="`tokenizer` must be a loaded tokenizer of transformers, got"):
        use_tokenizer(tokenizer)


def test_use_tokenizer_takes_names_only(pair: Pair) -> None:
    with pytest.raises(TypeError, match="`name` must be a string, got int"):
        use_tokenizer(pair.tokenizer, name=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`name` must be given.*`tokenizer_name_or_path`"):
        use_tokenizer(make_assistant_tokenizer())


def test_a_thought_token_added_in_memory_is_known_after_use_tokenizer(pair: Pair) -> None:
    tokenizer, base = extended(pair, "[T]", special=True)
    config = pair.config(thought_token="[T]")
    with pytest.raises(ValueError, match=r"`thought_token` must be one token of .*'\[T\]'.*`use_tokenizer\(tokenizer"):
        get_peft_model(base, config)
    use_tokenizer(tokenizer)
    text = QUESTIONS[1]
    model = get_peft_model(base, config).eval()
    row = tokenizer(text + "[T]" * 3)["input_ids"]
    expected = Oracle.of(model, pair.base, pair.assistant, 3)
    expected.base = base
    with model.disable_adapter():
        wanted = expected.generate(row[:-3], NEW)
    assert answers(model, [row])[0] == wanted
    # The assistant that shares the ids does not read the token either.
    twin = pair.config(
        thought_token="[T]", assistant_shares_tokenizer=True, assistant_model_name_or_path=str(pair.twin)
    )
    other = extended(pair, "[T]", special=True)[1]
    assert answers(get_peft_model(other, twin).eval(), [row])


def test_another_tokenizer_in_memory_makes_thoughts_stale(pair: Pair) -> None:
    rows = {"input_ids": pair.rows(QUESTIONS[:2])}
    thoughts = compute_thoughts(pair.model())(rows)
    tokenizer, base = extended(pair, "elephants")
    use_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="differs: `base_tokenizer` was"):
        use_thoughts(get_peft_model(base, pair.config()), thoughts)


# Ids that no tokenizer knows


def generate(model: nn.Module, row: list[int]) -> Any:
    return model.generate(torch.tensor([row]), max_new_tokens=1)


def forward(model: nn.Module, row: list[int]) -> Any:
    return model(torch.tensor([row]), logits_to_keep=1)


def train(model: nn.Module, row: list[int]) -> Any:
    return model.train()(torch.tensor([[*row, 9]]), labels=torch.tensor([[-100] * len(row) + [9]]))


def compute(model: nn.Module, row: list[int]) -> Any:
    return compute_thoughts(model)({"input_ids": [row]})


@pytest.mark.parametrize("run", [generate, forward, train, compute])
@pytest.mark.parametrize("shares", [False, None, True])
def test_ids_that_the_saved_tokenizer_lacks_are_refused(
    pair: Pair, run: Callable[..., Any], shares: bool | None
) -> None:
    tokenizer, base = extended(pair, "elephants")
    twin = AutoModelForCausalLM.from_pretrained(pair.twin)
    twin.resize_token_embeddings(400, mean_resizing=False)  # rows that nobody trained
    name = use_assistant(twin, AutoTokenizer.from_pretrained(pair.twin), name="twin")
    model = get_peft_model(base, pair.config(assistant_model_name_or_path=name, assistant_shares_tokenizer=shares))
    model.eval()
    run(model, pair.rows(["seven dogs"])[0])
    for unknown in (tokenizer.convert_tokens_to_ids("elephants"), len(tokenizer) + 3):
        with pytest.raises(ValueError, match=rf"`input_ids` .*{unknown}.*`use_tokenizer\(tokenizer\)`") as info:
            run(model, [9, unknown, 8])
        assert ("tokenizer_name_or_path" if shares is False else "assistant_shares_tokenizer") in str(info.value)
    padded = {"input_ids": torch.tensor([[unknown, 9, 8]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    model.eval()(**padded, logits_to_keep=1)  # padding is not read


@pytest.mark.parametrize("run", [generate, forward, compute])
@pytest.mark.parametrize("shares", [False, True])
def test_holes_in_a_vocabulary_are_refused(pair: Pair, tmp_path: Path, run: Callable[..., Any], shares: bool) -> None:
    folder = Path(shutil.copytree(pair.twin, tmp_path / "twin"))
    found = json.loads((folder / "tokenizer.json").read_text())
    last = {"content": "<last>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    found["added_tokens"].append(last | {"id": 345, "special": False})
    found["model"]["vocab"]["<last>"] = 345
    (folder / "tokenizer.json").write_text(json.dumps(found))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab()["<last>"] == 345
    assert 340 not in tokenizer.get_vocab().values()
    base, twin = pair.load_base(), AutoModelForCausalLM.from_pretrained(pair.twin)
    for one in (base, twin):
        one.resize_token_embeddings(400, mean_resizing=False)
    use_assistant(twin, tokenizer, name="twin")
    use_tokenizer(tokenizer, name=str(pair.base))
    model = get_peft_model(
        base, pair.config(assistant_model_name_or_path="twin", assistant_shares_tokenizer=shares)
    ).eval()
    run(model, [9, 345, 8])
    with pytest.raises(ValueError, match=r"`input_ids` must be known to .* got \[340\].*`use_tokenizer"):
        run(model, [9, 340, 8])


# Decoding


def test_decoding_does_not_clean_spaces_up(pair: Pair) -> None:
    letters = {"<pad>": 0, "<eos>": 1, **{chr(code): code for code in range(32, 127)}}
    backend = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    use_tokenizer(tokenizer, name=str(pair.base))
    texts = ["nine less four . How many ?", "x = [ 1 , 2 ] ! do n't"]
    model = pair.model(assistant_model_name_or_path=str(pair.twin), assistant_shares_tokenizer=False)
    thoughts = compute_thoughts(model)({"input_ids": tokenizer(texts)["input_ids"]})
    expected = pair.rows(texts)
    assert read(model, texts, tokenizer) == expected
    tokenizer.clean_up_tokenization_spaces = True
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"]) != texts[0]  # which loses spaces
    assert read(model, texts, tokenizer) == expected
    with pytest.raises(ValueError, match="`clean_up_tokenization_spaces` was None and is False"):
        use_thoughts(model, thoughts)  # those of 0.1.0 were read without these spaces


# Chat templates

ASSISTANT_TURN = "{% if add_generation_prompt %}[assistant] {% endif %}"
PARTS = (
    "{% for m in messages %}[{{ m['role'] }}] {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}" + ASSISTANT_TURN
)
FAITHFUL = {
    "as it is": "{{ messages[0]['content'] }}",
    "trimmed": "[user] {{ messages[0]['content'] | trim }} [assistant] ",
    "trimmed on one side": "[user] {{ messages[0]['content'].lstrip() }} [assistant] ",
    "chat markup": BASE_TEMPLATE,
    "strings and parts": "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{{ p['text'] | upper }}{% endfor %}{% endif %}{% endfor %}",
    "parts": PARTS,
    "parts, trimmed": PARTS.replace("part['text']", "part['text'] | trim"),
    "parts, and strings fail": "{% if messages[0]['content'] is string %}{{ raise_exception('parts!') }}{% endif %}"
    + PARTS,
}
LOSSY = {
    "drops": "[user] [assistant] ",
    "drops the last turn": "{% for m in messages[:-1] %}{{ m['content'] }}{% endfor %}" + ASSISTANT_TURN,
    "drops users": "{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}{% endfor %}",
    "upper-cases": "{{ messages[0]['content'] | upper }}",
    "lower-cases": "{{ messages[0]['content'] | lower }}",
    "cuts": "{{ messages[0]['content'][:2000] }}",
    "cuts the beginning": "{{ messages[0]['content'][5:] }}",
    "first line": "{{ messages[0]['content'].split('\n')[0] }}",
    "joins lines": "{{ messages[0]['content'].split('\n') | join(' ') }}",
    "escapes": "{{ messages[0]['content'] | e }}",
    "as JSON": "{{ messages | tojson }}",
    "single spaces": "{{ messages[0]['content'].split() | join(' ') }}",
    "replaces": "{{ messages[0]['content'] | replace('apples', 'pears') }}",
    "strips markup": "{{ messages[0]['content'] | striptags }}",
    "repeats": "{{ messages[0]['content'] }} {{ messages[0]['content'] }}",
    "parts, cut": PARTS.replace("part['text']", "part['text'][:9]"),
}


@pytest.mark.parametrize("name", FAITHFUL)
def test_a_chat_template_that_writes_the_user_s_turn_is_used(pair: Pair, assistant: Path, name: str) -> None:
    (assistant / "chat_template.jinja").write_text(FAITHFUL[name])
    model = pair.model(assistant_model_name_or_path=str(assistant), assistant_prompt="  how {prompt}\n")
    own = AutoTokenizer.from_pretrained(assistant)
    for text, row in zip(QUESTIONS, read(model, QUESTIONS, pair.tokenizer), strict=True):
        wanted = own(f"how {text}", add_special_tokens=False)["input_ids"]
        assert any(row[start : start + len(wanted)] == wanted for start in range(len(row)))
    assert reader_of(model).in_parts == name.startswith("parts")
    spelled = words(model, ["seven [EOS] dogs"], pair.tokenizer)[0]
    assert "seven" in spelled
    assert "dogs" in spelled


def test_a_chat_template_of_parts_gives_the_same_tokens(pair: Pair, assistant: Path, tmp_path: Path) -> None:
    plain = pair.model(assistant_model_name_or_path=str(pair.chat_assistant), assistant_prompt="{prompt}")
    (assistant / "chat_template.jinja").write_text(PARTS)
    model = pair.model(assistant_model_name_or_path=str(assistant), assistant_prompt="{prompt}")
    rows = pair.rows(QUESTIONS)
    assert answers(model, rows) == answers(plain, rows)  # the same turn, said otherwise
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(pair.load_base(), tmp_path / "adapter").eval()
    assert answers(reloaded, rows) == answers(model, rows)
    # Cached thoughts of 0.1.0 are of the turn without its content.
    thoughts = compute_thoughts(model)({"input_ids": rows})
    use_thoughts(model, thoughts)
    texts = thoughts["thoughts_fingerprint"]
    old = [json.dumps({k: v for k, v in json.loads(t).items() if k != "assistant_content"}) for t in texts]
    with pytest.raises(ValueError, match="`assistant_content` was None and is 'parts'"):
        use_thoughts(model, thoughts | {"thoughts_fingerprint": old})


@pytest.mark.parametrize("name", LOSSY)
def test_a_chat_template_that_loses_part_of_the_user_s_turn_is_refused(pair: Pair, assistant: Path, name: str) -> None:
    (assistant / "chat_template.jinja").write_text(LOSSY[name])
    pair.model(assistant_model_name_or_path=str(assistant))  # not used without `assistant_prompt`
    with pytest.raises(ValueError, match=r"chat template .*assistant' (must write the user's turn|cannot be)") as info:
        pair.model(assistant_model_name_or_path=str(assistant), assistant_prompt="Hint: {prompt}")
    assert "use_assistant(model, tokenizer" in str(info.value)
    assert "`assistant_prompt`" in str(info.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'][:20000] }}",
        "{% set content = messages[0]['content'] %}{{ content.split('</think>')[-1] }}",
    ],
)
def test_a_chat_template_that_loses_part_of_few_prompts_is_refused_with_them(
    pair: Pair, assistant: Path, template: str
) -> None:
    (assistant / "chat_template.jinja").write_text(template)
    model = pair.model(assistant_model_name_or_path=str(assistant), assistant_prompt="{prompt}")
    read(model, QUESTIONS, pair.tokenizer)
    with pytest.raises(ValueError, match="must write the user's turn as it is"):
        read(model, [QUESTIONS[0], "seven dogs </think> " * 1500 + "nine"], pair.tokenizer)


DATED = "Today is {{ strftime_now('%d %b %Y') }}. {{ messages[0]['content'] }}"


class _Later(clock.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> clock.datetime:
        return clock.datetime(2031, 1, 2)


@pytest.mark.parametrize("template", [DATED, DATED.replace("'%d %b %Y'", "format='%A %H:%M'")])
def test_thoughts_do_not_depend_on_the_day(
    pair: Pair, assistant: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.twin)  # which can write a date
    tokenizer.chat_template = template
    use_assistant(AutoModelForCausalLM.from_pretrained(pair.twin), tokenizer, name="dated")
    changes = {"assistant_model_name_or_path": "dated", "assistant_prompt": "{prompt}"}
    rows, model = pair.rows(QUESTIONS), pair.model(**changes)
    today = words(model, QUESTIONS, pair.tokenizer), answers(model, rows), compute_thoughts(model)({"input_ids": rows})
    monkeypatch.setattr(chat_template_utils, "datetime", _Later)
    message = [{"role": "user", "content": ""}]
    assert "2031" in tokenizer.apply_chat_template(message, tokenize=False) or "A" in template
    model = pair.model(**changes)
    assert words(model, QUESTIONS, pair.tokenizer) == today[0]
    assert answers(model, rows) == today[1]
    later = compute_thoughts(model)({"input_ids": rows})
    assert later["thoughts_fingerprint"] == today[2]["thoughts_fingerprint"]
    if template == DATED:
        assert today[0][0].startswith("Today is 26 Jul 2024. ")
    use_thoughts(model, today[2])
    old = [text.replace('"assistant_date": "2024-07-26", ', "") for text in later["thoughts_fingerprint"]]
    assert old != later["thoughts_fingerprint"]
    with pytest.raises(ValueError, match="`assistant_date` was None and is '2024-07-26'"):  # of 0.1.0
        use_thoughts(model, later | {"thoughts_fingerprint": old})


def test_fingerprints_of_what_is_read_as_before_are_as_before(pair: Pair, assistant: Path) -> None:
    for changes in ({}, {"assistant_model_name_or_path": str(assistant), "assistant_prompt": "{prompt}"}):
        thoughts = compute_thoughts(pair.model(**changes))({"input_ids": pair.rows(QUESTIONS[:1])})
        assert set(json.loads(thoughts["thoughts_fingerprint"][0])) == {
            "format", "assistant", "assistant_commit", "assistant_config", "assistant_weights", "assistant_dtype",
            "assistant_prompt", "assistant_chat_template", "assistant_tokenizer", "base_tokenizer",
            "assistant_thought_token_id", "num_thought_tokens",
        }  # fmt: skip


# Encoding


@pytest.mark.parametrize("prompt", [None, "how {prompt}"])
@pytest.mark.parametrize("direction", ["Left", "Right"])
def test_truncation_and_padding_that_a_tokenizer_was_saved_with_are_left_aside(
    pair: Pair, assistant: Path, prompt: str | None, direction: str
) -> None:
    texts = [*QUESTIONS, "seven [EOS] dogs"]
    changes = {"assistant_model_name_or_path": str(assistant), "assistant_prompt": prompt}
    expected = read(pair.model(**changes), texts, pair.tokenizer)
    found = json.loads((assistant / "tokenizer.json").read_text())
    found["truncation"] = {"direction": direction, "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    found["padding"] = {
        "strategy": {"Fixed": 64}, "direction": direction, "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
        "pad_token": "[PAD]",
    }  # fmt: skip
    (assistant / "tokenizer.json").write_text(json.dumps(found))
    saved = Tokenizer.from_file(str(assistant / "tokenizer.json"))
    assert len(saved.encode(QUESTIONS[0]).ids) == 64
    assert read(pair.model(**changes), texts, pair.tokenizer) == expected
    # The settings of a user's own call are not ours either.
    model = pair.model(**changes)
    reader_of(model).assistant.tokenizer(texts, truncation=True, max_length=3, padding="max_length")
    assert read(model, texts, pair.tokenizer) == expected


@pytest.mark.filterwarnings("error:The tokenizer of the assistant:UserWarning")
def test_words_that_the_assistant_cannot_read_are_said_once(pair: Pair) -> None:
    model = pair.model()
    read(model, QUESTIONS, pair.tokenizer)
    with pytest.warns(UserWarning, match=rf"assistant' {LOSES} \['\$12', '日本'\].*without them.*Choose an assistant"):
        read(model, [QUESTIONS[0], "seven $12 dogs 日本 $12"], pair.tokenizer)
    read(model, ["$13"], pair.tokenizer)  # not said again
    other = pair.model()
    with pytest.warns(UserWarning, match=LOSES) as caught:
        other.generate(**pair.batch(["x" * 5000, "seven"]), max_new_tokens=1)
    assert len(str(caught[0].message)) < 500


@pytest.mark.filterwarnings("error:The tokenizer of the assistant:UserWarning")
def test_words_that_a_tokenizer_drops_are_said_too(pair: Pair) -> None:
    backend = Tokenizer(models.BPE({"<eos>": 0, **{chr(code): code for code in range(97, 123)}}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    name = use_assistant(AutoModelForCausalLM.from_pretrained(pair.assistant), tokenizer, name="mine")
    model = pair.model(assistant_model_name_or_path=name)
    assert len(read(model, ["seven dogs"], pair.tokenizer)[0]) == 9
    with pytest.warns(UserWarning, match=rf"{LOSES} \['12'\]"):
        read(model, ["seven 12 dogs"], pair.tokenizer)


@pytest.mark.filterwarnings("error:The tokenizer of the assistant:UserWarning")
def test_words_that_a_tokenizer_knows_only_after_a_space_are_not_lost(pair: Pair) -> None:
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<eos>", "Tom", " has", " seven", " dogs"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[A-Za-z]+"), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    name = use_assistant(AutoModelForCausalLM.from_pretrained(pair.assistant), tokenizer, name="mine")
    model = pair.model(assistant_model_name_or_path=name)
    assert read(model, ["Tom has seven dogs"], pair.tokenizer) == [[2, 3, 4, 5]]
    with pytest.warns(UserWarning, match=rf"{LOSES} \['cats'\]"):
        read(model, ["Tom has cats"], pair.tokenizer)


@pytest.mark.filterwarnings("error:The tokenizer of the assistant:UserWarning")
def test_tokenizers_of_bytes_lose_nothing(pair: Pair) -> None:
    model = pair.model(assistant_model_name_or_path=str(pair.twin), assistant_shares_tokenizer=False)
    texts = ["日本 \N{GRINNING FACE} <b>12</b>"]
    assert words(model, texts, pair.tokenizer) == texts


def given(pair: Pair, vocabulary: int | None = None, **changes: Any) -> str:
    """An assistant whose tokenizer has been changed, and whose model has as many embeddings as is said."""
    tokenizer, model = make_assistant_tokenizer(), AutoModelForCausalLM.from_pretrained(pair.assistant)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary)
    return use_assistant(model, tokenizer, name="mine")


def saved(pair: Pair, folder: Path, **tokens: str) -> str:
    """The same in a folder; the model is as it was."""
    shutil.copytree(pair.assistant, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(tokens or {"pad_token": "[MORE]"})
    assert max(tokenizer.get_vocab().values()) >= AutoModelForCausalLM.from_pretrained(folder).config.vocab_size
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("prompt", [None, "{prompt}"])
def test_tokens_without_an_embedding_are_refused_in_words(pair: Pair, tmp_path: Path, prompt: str | None) -> None:
    folder = saved(pair, tmp_path / "larger")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["elephants", "mice"])
    tokenizer.save_pretrained(folder)
    model = pair.model(assistant_model_name_or_path=folder, assistant_prompt=prompt)
    read(model, QUESTIONS, pair.tokenizer)
    most = len(make_assistant_tokenizer())
    match = rf"has {most}, and the prompts hold id {most + 2} \('mice'\).*use_assistant\(model, tokenizer"
    with pytest.raises(ValueError, match=match):
        model.generate(**pair.batch(["seven mice", "two elephants"]), max_new_tokens=1)
    # With the model that belongs to it, all is read.
    larger = AutoModelForCausalLM.from_pretrained(pair.assistant)
    larger.resize_token_embeddings(len(tokenizer))
    use_assistant(larger, tokenizer, name=folder)
    model = pair.model(assistant_model_name_or_path=folder, assistant_prompt=prompt)
    model.generate(**pair.batch(["seven mice", "two elephants"]), max_new_tokens=1)


# Special ids


def tokens_of(model: nn.Module, pair: Pair) -> list[list[int]]:
    return generated(model, pair.batch(QUESTIONS), NEW, min_new_tokens=NEW)


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_padding_without_an_embedding_changes_nothing(pair: Pair, tmp_path: Path, where: str) -> None:
    expected = tokens_of(pair.model(), pair)
    if where == "folder":
        name = saved(pair, tmp_path / "larger", pad_token="[MORE]")
    else:
        name = given(pair, pad_token="[MORE]")
        given_assistants()[name].tokenizer.add_special_tokens({"pad_token": "[MORE]"})
    model = pair.model(assistant_model_name_or_path=name)
    assert reader_of(model).assistant.tokenizer.pad_token_id == len(make_assistant_tokenizer())
    assert tokens_of(model, pair) == expected
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    assert [oracle.generate(row, NEW)[:1] for row in pair.rows(QUESTIONS)] == [row[:1] for row in expected]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"unk_token": "[MORE]"}, "[EOS]"),
        ({"unk_token": "[MORE]", "eos_token": "[MORE]"}, "[PAD]"),
        ({"eos_token": "[MORE]"}, "[UNK]"),
        ({"pad_token": "[MORE]"}, "[UNK]"),
    ],
)
def test_the_thought_positions_hold_a_token_with_an_embedding(
    pair: Pair, tmp_path: Path, tokens: dict[str, str], expected: str
) -> None:
    model = pair.model(assistant_model_name_or_path=saved(pair, tmp_path / "larger", **tokens))
    own = reader_of(model)
    assert own.assistant_thought_token_id == own.assistant.tokenizer.get_vocab()[expected]
    chosen = pair.model(assistant_thought_token=expected)
    assert tokens_of(model, pair) == tokens_of(chosen, pair)


def test_an_assistant_without_any_of_them_needs_the_token_named(pair: Pair, tmp_path: Path) -> None:
    more = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "[MORE]")
    folder = saved(pair, tmp_path / "larger", **more)
    with pytest.raises(ValueError, match=r"`assistant_thought_token` must be given.*has an embedding for\. Name any"):
        pair.model(assistant_model_name_or_path=folder)
    assert tokens_of(pair.model(assistant_model_name_or_path=folder, assistant_thought_token="legs"), pair)
    with pytest.raises(ValueError, match=r"`assistant_thought_token` must have an embedding .* '\[MORE\]' with id"):
        pair.model(assistant_model_name_or_path=folder, assistant_thought_token="[MORE]")


@pytest.mark.parametrize("change", [5, -5])
def test_the_vocabulary_is_that_of_the_embedding(pair: Pair, change: int) -> None:
    most = len(make_assistant_tokenizer())
    name = given(pair)
    model = pair.model(assistant_model_name_or_path=name)
    loaded = given_assistants()[name].preloaded_model
    loaded.resize_token_embeddings(most + change)
    loaded.config.vocab_size = most  # a config need not follow
    ids = torch.full((1, 9), most + change - 1)
    model.generate(**pair.batch(QUESTIONS[:1]), assistant_input_ids=ids, max_new_tokens=1)
    with pytest.raises(ValueError, match=rf"`assistant_input_ids` must lie within .* 0 to {most + change - 1}, got"):
        model.generate(**pair.batch(QUESTIONS[:1]), assistant_input_ids=ids + 1, max_new_tokens=1)


def test_padding_of_the_caller_s_own_input_needs_no_embedding(pair: Pair) -> None:
    model, most = pair.model(), len(make_assistant_tokenizer())
    ids = torch.tensor([[most, most + 9, 9, 8, 7, 6, 5, 4]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    own = {"assistant_input_ids": ids, "assistant_attention_mask": mask}
    found = model(**pair.batch(QUESTIONS[:1]), **own, logits_to_keep=1).logits
    own["assistant_input_ids"] = ids.where(mask == 1, 1)
    assert torch.equal(model(**pair.batch(QUESTIONS[:1]), **own, logits_to_keep=1).logits, found)
    own = {"assistant_input_ids": ids, "assistant_attention_mask": torch.ones_like(mask)}
    with pytest.raises(ValueError, match="`assistant_input_ids` must lie within"):
        model(**pair.batch(QUESTIONS[:1]), **own, logits_to_keep=1)


@pytest.mark.parametrize("ids", [{}, {"bos_token_id": -1}, {"bos_token_id": 3}, {"eos_token_id": 60_000}])
def test_a_base_whose_config_names_ids_beyond_its_vocabulary_runs(pair: Pair, ids: dict[str, int]) -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
    base = GPT2LMHeadModel(GPT2Config(vocab_size=len(pair.tokenizer), **sizes, **{"eos_token_id": 1, **ids})).eval()
    assert base.config.bos_token_id == ids.get("bos_token_id", 50256)
    use_tokenizer(pair.tokenizer, name="base")
    model = get_peft_model(base, pair.config(tokenizer_name_or_path="base")).eval()
    batch = pair.batch(QUESTIONS)
    assert model.generate(**batch, max_new_tokens=NEW, pad_token_id=0).shape[0] == len(QUESTIONS)
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    labels[:, :-2] = -100
    model.train()(**batch, labels=labels).loss.backward()


def test_a_thought_token_without_an_embedding_in_the_base_is_refused(pair: Pair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    tokenizer.add_tokens([AddedToken("[T]", special=True)])
    use_tokenizer(tokenizer)
    base, most = pair.load_base(), len(pair.tokenizer)
    with pytest.raises(
        ValueError,
        match=rf"`thought_token` must have an embedding .* has {most}, got '\[T\]' with id {most}\. Call `base",
    ):
        get_peft_model(base, pair.config(thought_token="[T]"))
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    get_peft_model(base, pair.config(thought_token="[T]"))


# Paths


@pytest.mark.parametrize("field", ["assistant_model_name_or_path", "tokenizer_name_or_path"])
@pytest.mark.parametrize("name", ["models/own", "./own", "../own", "own"])
def test_a_relative_path_seen_from_another_folder_says_so(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, name: str
) -> None:
    (tmp_path / "there" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there" / "deep")
    source = pair.assistant if field.startswith("assistant") else pair.base
    shutil.copytree(source, Path(name))
    pair.model(**{field: name})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match=rf"(?s)`{field}`.*relative path.*absolute path") as info:
        pair.model(**{field: name})
    assert str((tmp_path / "here" / name).resolve()) in str(info.value)
    with pytest.raises(ValueError, match=f"`{field}`") as info:
        pair.model(**{field: str(tmp_path / "nowhere")})
    assert "relative path" not in str(info.value)
