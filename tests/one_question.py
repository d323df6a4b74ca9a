"""One question with an answer: a batch to train on, and what a model says to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from batches import generated
from oracle import Oracle
from tiny_pair import Pair
from torch import Tensor, nn

PROMPT, ANSWER, LATER = "What is nine less four?", " five", " five, as I said"


def answer(model: nn.Module, pair: Pair, **options: Any) -> list[int]:
    """Six greedy tokens."""
    (found,) = generated(model.eval(), pair.batch([PROMPT]), 6, do_sample=False, **options)
    return found


def response_batch(pair: Pair) -> dict[str, Tensor]:
    """Two rows of the question, labelled where they answer it."""
    ids = pair.tokenizer([PROMPT + LATER] * 2, return_tensors="pt")["input_ids"]
    labels = ids.where(torch.arange(ids.shape[1]) >= len(pair.tokenizer(PROMPT)["input_ids"]), -100)
    return {"input_ids": ids, "labels": labels}


def save_and_answer(pair: Pair, folder: Path) -> tuple[Path, list[int]]:
    """Save an adapter; returns its folder and the oracle's tokens."""
    model = pair.model()
    model.save_pretrained(folder)
    (prompt,) = pair.rows([PROMPT])
    return folder, Oracle.of(model, pair.base, pair.assistant, 4).generate(prompt, 6)
