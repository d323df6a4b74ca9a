"""A thought token that is also the padding, as in Qwen2.5, whose `<|endoftext|>` is both in the paper's recipe."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from tiny_pair import QUESTIONS, Pair
from torch.nn.utils.rnn import pad_sequence

from softcot_peft import with_thought_tokens

THOUGHT = 2  # "<thought>"
NEW = 8


def prompts(pair: Pair, model: PeftModel) -> tuple[list[list[int]], int]:
    """Chats with the run, and the id that both pads and marks."""
    tokenizer = copy.deepcopy(pair.tokenizer)
    tokenizer.pad_token = "<thought>"
    tokenizer = with_thought_tokens(tokenizer, model.peft_config["default"])
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"], tokenizer.pad_token_id


def test_batches_padded_with_the_thought_token_answer_as_single_prompts_do(pair: Pair) -> None:
    model = pair.model(thought_token="<thought>", placement="thought_token")
    rows, pad = prompts(pair, model)
    assert pad == THOUGHT
    assert len({len(row) for row in rows}) > 1
    ids = pad_sequence([torch.tensor(row) for row in rows], True, pad, "left")
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True, 0, "left")
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": pad}
    singles = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row))} for row in rows]
    alone = [
        model.generate(**single, **settings)[0, len(row) :].tolist() for single, row in zip(singles, rows, strict=True)
    ]
    stop = alone[0][2]  # so that one row ends early and is filled up with the thought token
    alone = [new[: new.index(stop) + 1] if stop in new else new for new in alone]
    together = model.generate(ids, attention_mask=mask, eos_token_id=stop, **settings)[:, ids.shape[1] :].tolist()
    assert together == [new + [pad] * (len(together[0]) - len(new)) for new in alone]
    assert any(new[-1] == pad for new in together)


def test_a_run_that_generate_takes_for_padding_is_called_hidden(pair: Pair) -> None:
    model = pair.model(thought_token="<thought>", placement="thought_token")
    rows, pad = prompts(pair, model)
    with pytest.raises(ValueError, match="`attention_mask` must not hide the run of `thought_token`"):
        model.generate(torch.tensor(rows[:1]), max_new_tokens=2, pad_token_id=pad)


def test_training_rows_padded_with_the_thought_token_have_the_loss_of_other_padding(pair: Pair) -> None:
    model = pair.model(thought_token="<thought>", placement="thought_token")
    rows, pad = prompts(pair, model)
    answers = [[5, 20 + i, 21, 1][: 2 + i % 3] for i in range(len(rows))]
    whole = [torch.tensor(row + answer) for row, answer in zip(rows, answers, strict=True)]
    labels = [torch.tensor([-100] * len(row) + answer) for row, answer in zip(rows, answers, strict=True)]
    batch = {
        "attention_mask": pad_sequence([torch.ones_like(row) for row in whole], True, 0),
        "labels": pad_sequence(labels, True, -100),
    }
    losses = [model(input_ids=pad_sequence(whole, True, fill), **batch).loss for fill in (pad, 0)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=0)
