"""Thoughts stand at a run of thought tokens, or else where the prompt ends; their positions are real positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import new_tokens, supervised
from oracle import Oracle
from peft import PeftModel, get_peft_model
from tiny_pair import QUESTIONS, Pair
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

N = 4
NEW = 10
SIDES = pytest.mark.parametrize("side", ["left", "right"])


class TestLine1WhereThoughtsGo:
    @SIDES
    def test_automatic_in_generate_after_the_last_token(
        self, pair: Pair, model: PeftModel, answers: list[list[int]], side: str
    ) -> None:
        batch = pair.batch(QUESTIONS, side)
        output = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        assert new_tokens(output, batch) == answers
        assert len({tuple(answer) for answer in answers}) == len(answers)  # the test can tell rows apart

    @SIDES
    def test_automatic_with_labels_before_the_first_one(
        self, pair: Pair, model: PeftModel, oracle: Oracle, side: str
    ) -> None:
        batch, rows = supervised(pair, side)
        output = model(**batch)
        torch.testing.assert_close(output.loss, oracle.mean_loss(rows), atol=1e-5, rtol=0)

    def test_responses_after_padded_prompts(self, pair: Pair, model: PeftModel, oracle: Oracle) -> None:
        prompts = pair.batch(QUESTIONS, "right")
        _, rows = supervised(pair, "right", ["So 12."] * 4)
        responses = torch.tensor([response for _, response in rows])
        batch = {
            "input_ids": torch.cat([prompts["input_ids"], responses], 1),
            "attention_mask": torch.cat([prompts["attention_mask"], torch.ones_like(responses)], 1),
            "labels": torch.cat([torch.full_like(prompts["input_ids"], -100), responses], 1),
        }
        torch.testing.assert_close(model(**batch).loss, oracle.mean_loss(rows), atol=1e-5, rtol=0)

    def test_automatic_without_labels_after_the_last_token(self, pair: Pair, model: PeftModel, oracle: Oracle) -> None:
        (row,) = pair.rows(QUESTIONS[:1])
        with pytest.warns(UserWarning, match="Without `labels`"):
            logits = model(torch.tensor([row])).logits
        torch.testing.assert_close(logits[:, -1:], model(torch.tensor([row]), logits_to_keep=1).logits)
        torch.testing.assert_close(logits[0, -1], oracle.logits(row, [])[-1], atol=1e-5, rtol=1e-5)

    @SIDES
    @pytest.mark.parametrize("num", [1, 3, 9])
    @pytest.mark.parametrize("tail", ["", " Answer:<|end|>"])
    def test_a_run_says_where_and_how_many(
        self, pair: Pair, model: PeftModel, oracle: Oracle, side: str, num: int, tail: str
    ) -> None:
        texts = [question + "<thought>" * num + tail for question in QUESTIONS]
        batch = pair.batch(texts, side)
        after = pair.tokenizer(tail)["input_ids"]
        judge = replace(oracle, num=num)
        want = [judge.generate(row, NEW, after) for row in pair.rows(QUESTIONS)]
        output = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        assert new_tokens(output, batch) == want
        uncached = model.generate(**batch, max_new_tokens=NEW, do_sample=False, use_cache=False)
        assert torch.equal(output, uncached)

    @SIDES
    def test_a_run_in_training(self, pair: Pair, model: PeftModel, oracle: Oracle, side: str) -> None:
        batch, rows = supervised(pair, side)
        placed: dict[str, list[Tensor]] = {name: [] for name in batch}
        for index, (prompt, _) in enumerate(rows):
            start = int(batch["attention_mask"][index].int().argmax()) + len(prompt)
            for name, fill in (("input_ids", 2), ("attention_mask", 1), ("labels", -100)):
                value = batch[name][index]
                placed[name].append(torch.cat([value[:start], torch.full((6,), fill), value[start:]]))
        output = model(**{name: torch.stack(value) for name, value in placed.items()})
        want = replace(oracle, num=6).mean_loss(rows)
        torch.testing.assert_close(output.loss, want, atol=1e-5, rtol=0)
        assert output.logits.shape[1] == placed["input_ids"][0].shape[0]  # the run is the caller's own

    def test_inference_number_where_text_is_written(self, pair: Pair) -> None:
        model = pair.model(num_thought_tokens=6, inference_num_thought_tokens=2)
        batch, rows = supervised(pair, "right")
        few = Oracle.of(model, pair.base, pair.assistant, 2)
        many, prompts = replace(few, num=6), pair.batch(QUESTIONS)
        for training in (True, False):
            model.train(training)
            torch.testing.assert_close(model(**batch).loss, many.mean_loss(rows), atol=1e-5, rtol=0)
            output = model.generate(**prompts, max_new_tokens=NEW, do_sample=False)
            assert new_tokens(output, prompts) == [few.generate(row, NEW) for row in pair.rows(QUESTIONS)]

    @SIDES
    @pytest.mark.parametrize("family", ["gpt2", "opt"])
    def test_thoughts_count_in_learned_positions(self, pair: Pair, tmp_path: Any, side: str, family: str) -> None:
        size = len(pair.tokenizer)
        if family == "gpt2":
            config = GPT2Config(
                vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.4,
                bos_token_id=1, eos_token_id=1,
            )  # fmt: skip
            base: Any = GPT2LMHeadModel(config)
        else:
            config = OPTConfig(
                vocab_size=size, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=128, init_std=0.4, word_embed_proj_dim=16, pad_token_id=0, bos_token_id=1,
                eos_token_id=1,
            )  # fmt: skip
            base = OPTForCausalLM(config)
        base.save_pretrained(tmp_path)
        pair.tokenizer.save_pretrained(tmp_path)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), pair.config()).eval()
        judge = Oracle.of(model, tmp_path, pair.assistant, N)
        batch, rows = supervised(pair, side)
        torch.testing.assert_close(model(**batch).loss, judge.mean_loss(rows), atol=1e-5, rtol=1e-5)
        prompts = pair.batch(QUESTIONS, side)
        output = model.generate(**prompts, max_new_tokens=NEW, do_sample=False)
        found = new_tokens(output, prompts, pad=1 if family == "gpt2" else 0)  # GPT-2 pads with EOS
        assert found == [judge.generate(row, NEW) for row in pair.rows(QUESTIONS)]

    def test_the_mask_is_inferred_as_generate_infers_it(
        self, pair: Pair, model: PeftModel, answers: list[list[int]]
    ) -> None:
        batch = pair.batch(QUESTIONS)
        output = model.generate(batch["input_ids"], max_new_tokens=NEW, do_sample=False)
        assert new_tokens(output, batch) == answers
