"""Generation with SoftCoT and other methods, and an evaluation with answers of different lengths.

Nothing is trained, so the output is meaningless; a logits processor ends each answer at a given length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from math import inf
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.benchmark import timer
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from softcot_peft.live_rows import LiveRows

from .models import EOS, FIRST, PAD, Pair, assistant_input, attach, projection_of
from .rivals import assistant_states

# Lengths of every 116th problem of GSM8K's training file and of its solution, without calculator annotations, in
# words, groups of up to three digits, and punctuation marks. Current tokenizers give nearly the same counts.
# fmt: off
LENGTHS = (
    (34, 30), (96, 118), (88, 106), (81, 111), (30, 85), (73, 98), (62, 62), (68, 91), (31, 81), (38, 50), (62, 49),
    (36, 62), (53, 56), (54, 127), (33, 55), (35, 42), (48, 42), (36, 36), (56, 64), (31, 48), (43, 67), (36, 33),
    (36, 25), (40, 60), (46, 91), (48, 83), (59, 101), (51, 63), (57, 107), (39, 58), (37, 53), (44, 35), (37, 116),
    (53, 103), (28, 57), (45, 40), (32, 74), (57, 62), (93, 137), (35, 53), (66, 37), (57, 49), (47, 87), (67, 56),
    (82, 89), (120, 112), (41, 50), (68, 102), (45, 53), (50, 35), (44, 31), (30, 32), (36, 41), (19, 33), (24, 48),
    (42, 43), (31, 91), (70, 62), (46, 40), (33, 116), (66, 111), (58, 164), (35, 50), (30, 28),
)
# fmt: on
Ask = Callable[..., Tensor]


def make_questions(number: int, longest_answer: int, vocabulary: int) -> list[tuple[Tensor, int]]:
    """Create prompts of random ids and the lengths of their answers, including EOS, with the lengths of GSM8K.

    Args:
        number: Number of prompts.
        longest_answer: Maximum length of an answer.
        vocabulary: Size of the models' vocabulary.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = [LENGTHS[index * len(LENGTHS) // number] for index in range(number)]
    return [
        (torch.randint(FIRST, vocabulary, (question,), generator=generator), min(longest_answer, answer + 1))
        for question, answer in chosen
    ]


class Ends(LogitsProcessor):
    """Forces EOS in each row at a given length, and not before.

    Args:
        lengths: Number of tokens of each row's answer, including EOS.
        device: Device of the scores.
        eos: Id of EOS.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, eos: int = EOS) -> None:
        self.left, self.eos = torch.tensor(lengths, device=device), eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Allow only EOS at the end of the answer, and all other tokens before. Changes one column of the scores."""
        self.left = self.left - 1
        scores[:, self.eos] = torch.where(self.left > 0, -inf, inf)
        return scores


class Ticks(StoppingCriteria):
    """Records the time of each token; never stops generation."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Record the time, after synchronizing with the accelerator."""
        self.times.append(timer())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def called(model: nn.Module) -> Ask:
    """Return the model's `generate`, reduced to the new ids."""
    model.eval()
    return lambda ids, mask, **settings: model.generate(input_ids=ids, attention_mask=mask, **settings)[
        :, ids.shape[1] :
    ]


def disabled(pair: Pair, num: int) -> nn.Module:
    """Return a base with a disabled adapter."""
    model = attach(pair, num)
    model.base_model.disable_adapter_layers()
    return model


def bare(pair: Pair, base: PreTrainedModel, num: int) -> Ask:
    """Return SoftCoT's `generate` as bare operations: the assistant's backbone, then the base's own `generate`."""
    projection = projection_of(attach(pair, num))

    @torch.no_grad()
    def ask(ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        prompts = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
        hidden = assistant_states(pair, *assistant_input(pair.reading, prompts, num, ids.device), num)
        placed = torch.cat([mask, mask.new_ones(len(ids), num)], 1)
        embedded = base.get_input_embeddings()(ids)
        thoughts = projection(hidden.float()).to(embedded)
        return base.generate(inputs_embeds=torch.cat([embedded, thoughts], 1), attention_mask=placed, **settings)

    return ask


def answer(
    ask: Ask, questions: Sequence[tuple[Tensor, int]], device: torch.device, eos: int = EOS, **settings: Any
) -> Tensor:
    """Generate greedy answers to one left-padded batch of questions."""
    ids = [ids for ids, _ in questions]
    ends = Ends([length for _, length in questions], device, eos)
    return ask(
        pad_sequence(ids, True, PAD, "left").to(device),
        pad_sequence([torch.ones_like(row) for row in ids], True, 0, "left").to(device),
        do_sample=False,
        max_new_tokens=max(length for _, length in questions),
        logits_processor=LogitsProcessorList([ends]),
        **settings,
    )


def evaluate(
    ask: Ask,
    questions: Sequence[tuple[Tensor, int]],
    at_once: int,
    device: torch.device,
    model: PreTrainedModel | PeftModel | None = None,
    eos: int = EOS,
) -> list[Tensor]:
    """Answer all questions in batches of similar length.

    Args:
        ask: Function that generates.
        questions: Prompts and the lengths of their answers.
        at_once: Rows per batch.
        device: Device of the models.
        model: Model from whose batches finished sequences are dropped, as in `examples/evaluate.py`; `None`: all rows
            run until the longest answer is finished.
        eos: Id of EOS.
    """
    answers = []
    for batch in batches(questions, at_once):
        with nullcontext() if model is None else LiveRows(model) as live:
            criteria = None if live is None else StoppingCriteriaList([live])
            answers.append(answer(ask, batch, device, eos, stopping_criteria=criteria))
    return answers


def batches(questions: Sequence[tuple[Tensor, int]], at_once: int) -> list[list[tuple[Tensor, int]]]:
    """Group questions into batches of similar length."""
    by_length = sorted(questions, key=lambda question: len(question[0]))
    return [by_length[start : start + at_once] for start in range(0, len(by_length), at_once)]


def busy(questions: Sequence[tuple[Tensor, int]], at_once: int) -> float:
    """Return the share of a batch's steps in which a row is not finished, over all rows."""
    steps = sum(len(batch) * max(length for _, length in batch) for batch in batches(questions, at_once))
    return sum(length for _, length in questions) / steps


def step_seconds(ask: Ask, questions: Sequence[tuple[Tensor, int]], tokens: int, device: torch.device) -> float:
    """Return the median seconds between two tokens of one batch, after the first.

    Args:
        ask: Function that generates.
        questions: Prompts.
        tokens: Number of tokens per answer.
        device: Device of the models.
    """
    ticks = Ticks()
    questions = [(ids, tokens) for ids, _ in questions]
    answer(ask, questions, device, stopping_criteria=StoppingCriteriaList([ticks]))
    return median(later - earlier for earlier, later in pairwise(ticks.times))
