"""Rows and batches, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from oracle import Oracle
from peft import PeftModel
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

# Rows and batches

IGNORED = -100


def responses_of(pair: Pair, answers: Sequence[str]) -> list[list[int]]:
    """Answers as ids, each with an EOS."""
    return pair.rows([answer + "<eos>" for answer in answers])


def labelled(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], between: Sequence[int] = ()
) -> list[dict[str, list[int]]]:
    """Rows with labels on their responses; `between` stands between prompt and response."""
    rows = [([*prompt, *between], response) for prompt, response in zip(prompts, responses, strict=True)]
    return [
        {"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response} for prompt, response in rows
    ]


def collate(rows: Sequence[dict[str, list[int]]], side: str = "right") -> dict[str, Tensor]:
    """Labelled rows as a batch, padded on a side."""
    fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    rows = [{"attention_mask": [1] * len(row["input_ids"])} | row for row in rows]
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], True, fill, side) for name, fill in fills.items()
    }


def supervised(
    pair: Pair, side: str, responses: list[str] | None = None
) -> tuple[dict[str, Tensor], list[tuple[list[int], list[int]]]]:
    """The questions with responses of different lengths, the responses labelled, and both as lists."""
    texts = responses or ["So 12.", "Fourteen legs, since a dog has two pairs", "120 miles", "5"]
    rows = list(zip(pair.rows(QUESTIONS), responses_of(pair, texts), strict=True))
    return collate(labelled(*zip(*rows, strict=True)), side), rows


def last_labels(ids: Tensor, count: int) -> Tensor:
    """Labels on the last tokens of every row."""
    labels = torch.full_like(ids, IGNORED)
    labels[:, -count:] = ids[:, -count:]
    return labels


def one_more(batch: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """What follows a cached batch when it goes on with these tokens, `(B, T)`."""
    mask = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(tokens.shape)], dim=1)
    return {"input_ids": tokens, "attention_mask": mask}


# What a model says

CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 2e-4}  # logits around 10, of several hundred roundings


def up_to_eos(rows: Sequence[list[int]], pad: int = 0, eos: int = 1) -> list[list[int]]:
    """Each row up to and with its first EOS; nothing but padding may follow it."""
    ends = [row.index(eos) + 1 if eos in row else len(row) for row in rows]
    assert all(set(row[end:]) <= {pad} for row, end in zip(rows, ends, strict=True))
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def after_prompts(output: Tensor, batch: dict[str, Tensor]) -> list[list[int]]:
    """What `generate` returned after the prompts of a batch, which must be the caller's."""
    length = batch["input_ids"].shape[1]
    copies = output.shape[0] // batch["input_ids"].shape[0]
    assert torch.equal(output[:, :length], batch["input_ids"].repeat_interleave(copies, 0))
    return output[:, length:].tolist()


def new_tokens(output: Tensor, batch: dict[str, Tensor], pad: int = 0) -> list[list[int]]:
    """The same, each row up to and with its EOS."""
    return up_to_eos(after_prompts(output, batch), pad)


def generated(model: nn.Module, batch: dict[str, Tensor], new: int, **options: Any) -> list[list[int]]:
    """New tokens of a batch, each row up to and with its EOS; with `min_new_tokens`, exactly as many."""
    return new_tokens(model.generate(**batch, max_new_tokens=new, **options), batch)


def next_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the token after each row of a batch, `(B, V)`."""
    with torch.no_grad():
        return model(**batch, logits_to_keep=1).logits[:, -1]


def check_against(oracle: Oracle, model: nn.Module, pair: Pair, texts: list[str] = QUESTIONS) -> None:
    """The logits of the token after each text are the oracle's."""
    for row, logits in zip(pair.rows(texts), next_logits(model, pair.batch(texts)), strict=True):
        torch.testing.assert_close(logits, oracle.logits(row, [])[-1], **CLOSE)


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
    """The output of a step, and the gradients of what is trained."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output, [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """The same, the gradients as one vector."""
    output, found = gradients(model, batch)
    return output, torch.cat([gradient.flatten() for gradient in found])


def training_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a step that predicts the last token of every row."""
    return model.train()(**batch, labels=last_labels(batch["input_ids"], 1)).loss


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state dicts are bit-identical."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# What the base runs


@contextmanager
def base_passes(model: nn.Module) -> Iterator[list[int]]:
    """Collects how many rows each run of a Llama's first layer has, with an adapter or without."""
    rows: list[int] = []
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    handle = base.model.layers[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        handle.remove()
