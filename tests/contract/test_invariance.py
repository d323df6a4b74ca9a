"""Batched is single, left is right padding, cached is uncached, and each beam has its own prompt's thoughts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import new_tokens, supervised
from helpers import CACHE_NAME
from oracle import Oracle
from peft import PeftModel
from tiny_pair import QUESTIONS, Pair
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

NEW = 10
SIDES = pytest.mark.parametrize("side", ["left", "right"])


class TestLine5Invariance:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"prefill_chunk_size": 5},
            {"prompt_lookup_num_tokens": 3},
        ],
        ids=["dynamic", "uncached", "static", "chunked", "prompt-lookup"],
    )
    @SIDES
    def test_however_it_is_decoded(
        self, pair: Pair, model: PeftModel, answers: list[list[int]], options: dict[str, Any], side: str
    ) -> None:
        texts = QUESTIONS[:1] if "prompt_lookup_num_tokens" in options else QUESTIONS
        batch = pair.batch(texts, side)
        output = model.generate(**batch, max_new_tokens=NEW, do_sample=False, **options)
        assert new_tokens(output, batch) == answers[: len(texts)]

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_batched_as_single(self, pair: Pair, model: PeftModel, answers: list[list[int]], cache: str) -> None:
        options: dict[str, Any] = {} if cache == "dynamic" else {"cache_implementation": cache}
        for row, answer in zip(pair.rows(QUESTIONS), answers, strict=True):
            output = model.generate(torch.tensor([row]), max_new_tokens=NEW, do_sample=False, **options)
            assert output[0].tolist() == row + answer

    @SIDES
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_every_beam_uses_its_own_prompts_thoughts(
        self, pair: Pair, model: PeftModel, oracle: Oracle, side: str, use_cache: bool
    ) -> None:
        options: dict[str, Any] = {
            "max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2, "do_sample": False,
        }  # fmt: skip
        batch = pair.batch(QUESTIONS, side)
        got = new_tokens(model.generate(**batch, **options, use_cache=use_cache), batch)
        want = [tokens for row in pair.rows(QUESTIONS) for tokens in oracle.sample(row, **options)]
        assert got == [row[: row.index(1) + 1] if 1 in row else row for row in want]

    def test_sampling_draws_from_the_oracles_distribution(self, pair: Pair, model: PeftModel, oracle: Oracle) -> None:
        options: dict[str, Any] = {
            "max_new_tokens": NEW, "do_sample": True, "temperature": 1.3, "top_k": 0, "num_return_sequences": 3,
        }  # fmt: skip
        for row in pair.rows(QUESTIONS[:2]):
            torch.manual_seed(5)
            want = oracle.sample(row, **options)
            torch.manual_seed(5)
            got = model.generate(torch.tensor([row]), **options)[:, len(row) :].tolist()
            assert got == want
            assert len({tuple(tokens) for tokens in got}) > 1

    @SIDES
    def test_repetition_penalties_do_not_see_thoughts(
        self, pair: Pair, model: PeftModel, oracle: Oracle, answers: list[list[int]], side: str
    ) -> None:
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.8)])
        batch = pair.batch(QUESTIONS, side)
        output = model.generate(**batch, max_new_tokens=NEW, do_sample=False, repetition_penalty=1.8)
        want = [oracle.generate(row, NEW, processors=processors) for row in pair.rows(QUESTIONS)]
        assert new_tokens(output, batch) == want
        assert want != answers

    def test_ngram_bans_do_not_see_thoughts(
        self, pair: Pair, model: PeftModel, oracle: Oracle, answers: list[list[int]]
    ) -> None:
        processors = LogitsProcessorList([NoRepeatNGramLogitsProcessor(1)])
        rows = pair.rows(QUESTIONS)  # one by one: the ban sees padding too, in transformers as it is
        got = [
            model.generate(torch.tensor([row]), max_new_tokens=NEW, do_sample=False, no_repeat_ngram_size=1)
            for row in rows
        ]
        want = [oracle.generate(row, NEW, processors=processors) for row in rows]
        assert [tokens[0, len(row) :].tolist() for tokens, row in zip(got, rows, strict=True)] == want
        assert want != answers

    def test_assisted_decoding_alongside(self, pair: Pair, model: PeftModel, answers: list[list[int]]) -> None:
        draft = pair.load_base()
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        for row, answer in zip(pair.rows(QUESTIONS), answers, strict=True):
            output = model.generate(torch.tensor([row]), max_new_tokens=NEW, do_sample=False, assistant_model=draft)
            assert output[0].tolist() == row + answer

    @SIDES
    def test_a_manual_decoding_loop(self, pair: Pair, model: PeftModel, answers: list[list[int]], side: str) -> None:
        batch = pair.batch(QUESTIONS, side)
        mask = batch["attention_mask"]
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        with torch.no_grad():
            with pytest.warns(UserWarning, match="Without `labels`"):  # right-padded rows end in other columns
                output = model(**batch, use_cache=True)
            token = output.logits[torch.arange(4), last].argmax(-1)
            tokens = [token]
            for _ in range(NEW - 1):
                mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1)
                output = model(token[:, None], attention_mask=mask, **{CACHE_NAME: output[CACHE_NAME]})
                token = output.logits[:, -1].argmax(-1)
                tokens.append(token)
        rows = torch.stack(tokens, 1).tolist()
        assert [row[: len(answer)] for row, answer in zip(rows, answers, strict=True)] == answers

    def test_disabled_is_the_base_bit_for_bit(self, pair: Pair, model: PeftModel) -> None:
        batch, _ = supervised(pair, "left")
        prompts = pair.batch(QUESTIONS)
        base = pair.load_base()
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, base(**batch).logits)
            got = model.generate(**prompts, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(got, base.generate(**prompts, max_new_tokens=NEW, do_sample=False))
        assert not torch.equal(got, model.generate(**prompts, max_new_tokens=NEW, do_sample=False))
