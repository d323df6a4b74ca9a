"""`split_conversations`: rows with one supervised turn, and what TRL and the model make of them."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Oracle
from tiny_pair import RUN, Pair, with_template
from trainers import losses, sft
from transformers import PreTrainedTokenizerBase

import softcot_peft
from softcot_peft import split_conversations, with_thought_tokens

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

pytestmark = [  # as in test_trl.py
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Gradient checkpointing turns two-pass training off:UserWarning"),
]

N = 4
Chat = list[dict[str, Any]]

SYSTEM = {"role": "system", "content": "Be brief."}
ASKS = [{"role": "user", "content": text} for text in ("How many legs?", "And dogs?", "In hours?")]
SAYS = [{"role": "assistant", "content": text} for text in ("Seven.", "Twenty eight legs.", "Two hours.")]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "legs"}}]}
TOOL = {"role": "tool", "name": "legs", "content": "4"}
CHATS: dict[str, Chat] = {
    "one turn": [ASKS[0], SAYS[0]],
    "several turns": [ASKS[0], SAYS[0], ASKS[1], SAYS[1], ASKS[2], SAYS[2]],
    "system prompt": [SYSTEM, ASKS[0], SAYS[0], ASKS[1], SAYS[1]],
    "consecutive turns": [ASKS[0], SAYS[0], SAYS[1], ASKS[2], SAYS[2]],
    "tool call": [ASKS[0], CALL, TOOL, SAYS[1]],
    "last turn unanswered": [ASKS[0], SAYS[0], ASKS[1]],
    "only a system prompt before": [SYSTEM, SAYS[0]],
}
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] if message['role'] != 'tool' else 'user' }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function']['name'] }}{% endfor %}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def split(*chats: Chat) -> list[tuple[Chat, Chat]]:
    rows = split_conversations({"messages": list(chats)})
    return list(zip(rows["prompt"], rows["completion"], strict=True))


def data(**columns: Any) -> Any:
    return datasets.Dataset.from_dict({"messages": list(CHATS.values()), **columns})


def mapped(dataset: Any, **options: Any) -> Any:
    return dataset.map(split_conversations, batched=True, remove_columns=dataset.column_names, **options)


def marked(pair: Pair) -> PreTrainedTokenizerBase:
    """The base's tokenizer with a template that marks the assistant's turns for TRL."""
    return with_template(pair.tokenizer, TEMPLATE)


def supervised(ids: list[int], labels: list[int]) -> list[tuple[int, int]]:
    """Columns and tokens of the labels."""
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return [(column, label) for column, label in enumerate(labels) if label != -100]


# Rows


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_every_assistant_turn_is_a_row_with_all_that_stands_before_it(chat: Chat) -> None:
    turns = [turn for turn, message in enumerate(chat) if message["role"] == "assistant"]
    assert split(chat) == [(chat[:turn], [chat[turn]]) for turn in turns]


def test_other_columns_are_repeated_and_those_that_are_replaced_are_not() -> None:
    chats = [CHATS["several turns"], CHATS["one turn"]]
    rows = split_conversations({"prompt": ["text", "text"], "messages": chats, "tools": [None, "[]"], "id": [7, 8]})
    assert list(rows) == ["prompt", "completion", "tools", "id"]
    assert rows["id"] == [7, 7, 7, 8]
    assert rows["tools"] == [None, None, None, "[]"]
    assert rows["prompt"][3] == [ASKS[0]]


def test_of_prompt_and_completion_the_turns_of_the_completion_are_split() -> None:
    chat = CHATS["several turns"]
    rows = split_conversations({"prompt": [chat[:3]], "completion": [chat[3:]]})
    assert rows == {"prompt": [chat[:3], chat[:5]], "completion": [[chat[3]], [chat[5]]]}


def test_turns_that_open_a_conversation_are_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="assistant turns that open their conversation"):
        assert split([SAYS[0], ASKS[1], SAYS[1]], [SAYS[0]]) == [([SAYS[0], ASKS[1]], [SAYS[1]])]


@pytest.mark.parametrize("chat", [[], [SYSTEM], [ASKS[0]], [ASKS[0], TOOL]], ids=len)
def test_conversations_without_an_assistant_turn_give_no_row_and_a_warning(chat: Chat) -> None:
    with pytest.warns(UserWarning, match="conversations without an assistant turn"):
        assert len(split(chat, CHATS["one turn"])) == 1


def test_a_data_set_is_warned_about_once_and_not_in_every_batch() -> None:
    dataset = datasets.Dataset.from_dict({"messages": [[ASKS[0]], [SAYS[0]], CHATS["one turn"]] * 4})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        assert mapped(dataset, batch_size=3, load_from_cache_file=False).num_rows == 4
    assert len([warning for warning in seen if "split_conversations" in str(warning.message)]) == 2


# With `datasets`


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"batch_size": None}, {"num_proc": 2}], ids=str)
def test_datasets_of_any_kind_are_split_alike(options: dict[str, Any]) -> None:
    plain = [chat for name, chat in CHATS.items() if name != "tool call"]
    dataset = datasets.Dataset.from_dict({"messages": plain, "id": range(len(plain))})
    rows = mapped(dataset, **options)
    assert set(rows.column_names) == {"prompt", "completion", "id"}
    assert [(row["prompt"], row["completion"]) for row in rows] == split(*plain)
    assert rows["id"][:4] == [0, 1, 1, 1]
    splits = datasets.DatasetDict(train=dataset)
    splits = splits.map(split_conversations, batched=True, remove_columns=dataset.column_names)
    assert list(splits["train"]) == list(rows)


def test_streams_are_split() -> None:
    rows = list(mapped(data().to_iterable_dataset()))
    assert len(rows) == len(split(*CHATS.values()))
    nameless = datasets.IterableDataset.from_generator(lambda: iter(data(id=list(CHATS))))
    assert nameless.column_names is None
    found = nameless.map(split_conversations, batched=True, remove_columns=["messages", "id"])
    assert [{"prompt": row["prompt"], "completion": row["completion"]} for row in found] == rows


def test_keys_that_datasets_fills_with_none_stay_and_late_tool_calls_need_one_batch() -> None:
    dataset = datasets.Dataset.from_dict({"messages": [CHATS["one turn"]] * 4 + [CHATS["tool call"]]})
    with pytest.raises(TypeError, match=r"[Cc]ouldn't cast"):
        mapped(dataset, batch_size=2)
    rows = mapped(dataset, batch_size=None)
    assert rows[0]["completion"] == [{**SAYS[0], "tool_calls": None, "name": None}]
    assert rows[4]["completion"] == [{**CALL, "name": None}]
    assert [message["name"] for message in rows[5]["prompt"]] == [None, None, "legs"]


# With TRL and the model


def prepared(pair: Pair, folder: Path, dataset: Any, **options: Any) -> Any:
    """TRL's own preparation, as columns `input_ids` and `labels`."""
    return sft(pair, folder, pair.config(), dataset, marked(pair), **options).train_dataset


def test_the_same_tokens_are_supervised_as_with_assistant_only_loss(pair: Pair, tmp_path: Path) -> None:
    whole = prepared(pair, tmp_path, data(), assistant_only_loss=True)
    rows = iter(prepared(pair, tmp_path, mapped(data())))
    for chat, one in zip(CHATS.values(), whole, strict=True):
        found: list[tuple[int, int]] = []
        for _ in range(len(split(chat))):
            row = next(rows)
            assert row["input_ids"] == one["input_ids"][: len(row["input_ids"])]
            found += supervised(row["input_ids"], row["labels"])
        assert found == supervised(one["input_ids"], one["labels"])
        assert found
    assert next(rows, None) is None


@pytest.mark.parametrize("run", [False, True], ids=["automatic", "run in the user's turn"])
def test_the_thoughts_of_each_row_stand_where_generate_puts_them(run: bool, pair: Pair, tmp_path: Path) -> None:
    config = pair.config(**(RUN if run else {}))
    tokenizer = with_thought_tokens(marked(pair), config) if run else marked(pair)
    chats = [chat for name, chat in CHATS.items() if name != "only a system prompt before"]  # no user's turn
    trainer = sft(pair, tmp_path, config, mapped(datasets.Dataset.from_dict({"messages": chats})), tokenizer)
    model = trainer.model
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    thought = tokenizer.convert_tokens_to_ids("<thought>")
    for row, (prompt, _) in zip(trainer.train_dataset, split(*chats), strict=True):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        start = ids.index(thought) if run else len(ids)
        before, after = ids[:start], ids[start + N :]
        assert model.eval().generate(torch.tensor([ids]), max_new_tokens=4)[0, len(ids) :].tolist() == oracle.generate(
            before, 4, after
        )
        assert row["input_ids"][: len(ids)] == ids
        response = row["input_ids"][len(ids) :]
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
        for mode in (False, True):
            loss = float(model.train(mode)(**batch).loss.detach())
            assert loss == pytest.approx(float(oracle.loss(before, response, after).detach()), abs=1e-4)


def test_the_example_of_the_docstring_runs(pair: Pair, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", split_conversations.__doc__ or "", flags=re.DOTALL)
    example = "\n".join(line.strip() for line in example.splitlines())
    example = example.replace("SFTTrainer(model", "SFTTrainer(model, processing_class=tokenizer")
    example = example.replace("SFTConfig(...)", "arguments").replace("SoftCoTConfig(...)", "config")
    options = {"max_steps": 12, "per_device_train_batch_size": 13}
    arguments = sft(pair, tmp_path, pair.config(), data(), marked(pair), **options).args
    names = {"model": pair.load_base(), "tokenizer": marked(pair), "dataset": data(), "arguments": arguments}
    names |= {"config": pair.config(), "SFTTrainer": trl.SFTTrainer, "softcot_peft": softcot_peft}
    exec(compile(example, "split_conversations", "exec"), names)
    trainer: Any = names["trainer"]
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]


# Errors


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"text": ["a"]}, "in a column `messages`, or in `prompt` and `completion`, got the columns text"),
        ({"prompt": [[ASKS[0]]], "id": [1]}, "got the columns id, prompt"),
    ],
)
def test_missing_columns_are_named(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_conversations(batch)


@pytest.mark.parametrize("bad", ["hello", None, 3, [None], ["hello"], [{"from": "human", "value": "Hi"}]], ids=repr)
@pytest.mark.parametrize("column", ["messages", "completion"])
def test_what_is_not_a_list_of_messages_is_refused(column: str, bad: Any) -> None:
    batch = {column: [CHATS["one turn"], bad]} | ({"prompt": [[ASKS[0]]] * 2} if column == "completion" else {})
    with pytest.raises(
        TypeError, match=rf"`{column}` must hold lists of messages .* but row 1 of a batch has"
    ) as info:
        split_conversations(batch)
    assert repr(bad)[:20] in str(info.value)


@pytest.mark.parametrize("column", ["messages", "completion"])
def test_without_batched_it_says_so(column: str) -> None:
    dataset = datasets.Dataset.from_dict({column: [CHATS["one turn"]]} | {"prompt": [[ASKS[0]]]})
    for one in (dataset, dataset.to_iterable_dataset()):
        with pytest.raises(TypeError, match="`batched=True`"):
            list(one.map(split_conversations, remove_columns=["prompt", column]))


def test_a_data_set_itself_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got Dataset\. Pass the function to `dataset\.map"):
        split_conversations(data())
