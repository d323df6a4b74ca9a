"""The contract of docs/design.md, line by line, against the oracle. Line 4 is in test_routes.py, test_trl.py and
test_lm_eval.py, lines 7 and 8 in test_training.py and test_routes.py, line 9 in test_errors.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import CACHE_NAME, assistant_passes, collate, labelled, new_tokens, projection_of, up_to_eos
from oracle import Oracle
from peft import PeftModel, get_peft_model
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    OPTConfig,
    OPTForCausalLM,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

N = 4
NEW = 10
SIDES = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture(scope="module")
def answers(pair: Pair, oracle: Oracle) -> list[list[int]]:
    """The oracle's greedy tokens for every question."""
    return [oracle.generate(row, NEW) for row in pair.rows(QUESTIONS)]


@contextmanager
def recorded_thoughts(model: nn.Module) -> Iterator[list[Tensor]]:
    """The soft thoughts of every pass."""
    thoughts: list[Tensor] = []
    handle = projection_of(model).register_forward_hook(lambda *args: thoughts.append(args[2].detach()))
    yield thoughts
    handle.remove()


def supervised(
    pair: Pair, side: str, responses: list[str] | None = None
) -> tuple[dict[str, Tensor], list[tuple[list[int], list[int]]]]:
    """Prompts with responses of different lengths, the responses labelled, and both as lists."""
    texts = responses or ["So 12.", "Fourteen legs, since a dog has two pairs", "120 miles", "5"]
    rows = [(p, pair.tokenizer(t)["input_ids"] + [1]) for p, t in zip(pair.rows(QUESTIONS), texts, strict=True)]
    return collate(labelled(*zip(*rows, strict=True)), side), rows


def oracle_loss(oracle: Oracle, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """Mean over all response tokens of a batch."""
    losses = torch.stack([oracle.loss(p, r) * len(r) for p, r in rows])
    return losses.sum() / sum(len(r) for _, r in rows)


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
        torch.testing.assert_close(output.loss, oracle_loss(oracle, rows), atol=1e-5, rtol=0)

    def test_responses_after_padded_prompts(self, pair: Pair, model: PeftModel, oracle: Oracle) -> None:
        prompts = pair.batch(QUESTIONS, "right")
        _, rows = supervised(pair, "right", ["So 12."] * 4)
        responses = torch.tensor([response for _, response in rows])
        batch = {
            "input_ids": torch.cat([prompts["input_ids"], responses], 1),
            "attention_mask": torch.cat([prompts["attention_mask"], torch.ones_like(responses)], 1),
            "labels": torch.cat([torch.full_like(prompts["input_ids"], -100), responses], 1),
        }
        torch.testing.assert_close(model(**batch).loss, oracle_loss(oracle, rows), atol=1e-5, rtol=0)

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
        want = oracle_loss(replace(oracle, num=6), rows)
        torch.testing.assert_close(output.loss, want, atol=1e-5, rtol=0)
        assert output.logits.shape[1] == placed["input_ids"][0].shape[0]  # the run is the caller's own

    def test_inference_number_where_text_is_written(self, pair: Pair) -> None:
        model = pair.model(num_thought_tokens=6, inference_num_thought_tokens=2)
        batch, rows = supervised(pair, "right")
        few = Oracle.of(model, pair.base, pair.assistant, 2)
        many, prompts = replace(few, num=6), pair.batch(QUESTIONS)
        for training in (True, False):
            model.train(training)
            torch.testing.assert_close(model(**batch).loss, oracle_loss(many, rows), atol=1e-5, rtol=0)
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
        torch.testing.assert_close(model(**batch).loss, oracle_loss(judge, rows), atol=1e-5, rtol=1e-5)
        prompts = pair.batch(QUESTIONS, side)
        output = model.generate(**prompts, max_new_tokens=NEW, do_sample=False)
        assert new_tokens(output, prompts) == [judge.generate(row, NEW) for row in pair.rows(QUESTIONS)]

    def test_the_mask_is_inferred_as_generate_infers_it(
        self, pair: Pair, model: PeftModel, answers: list[list[int]]
    ) -> None:
        batch = pair.batch(QUESTIONS)
        output = model.generate(batch["input_ids"], max_new_tokens=NEW, do_sample=False)
        assert new_tokens(output, batch) == answers


class TestLine2NoLeak:
    def test_no_later_token_changes_a_thought(self, pair: Pair, model: PeftModel) -> None:
        batch, _ = supervised(pair, "right")
        with recorded_thoughts(model) as thoughts:
            model(**batch)
            response = batch["labels"] != -100
            changed = torch.where(response, 100 + (batch["input_ids"] + 7) % 100, batch["input_ids"])
            model(**{**batch, "input_ids": changed, "labels": torch.where(response, changed, -100)})
            prompt = batch["input_ids"].clone()
            prompt[:, 1] = 100 + (prompt[:, 1] + 7) % 100
            model(**{**batch, "input_ids": prompt})
        assert torch.equal(thoughts[0], thoughts[1])
        assert not torch.allclose(thoughts[0], thoughts[2], atol=1e-3)  # and the prompt does

    def test_nothing_after_a_run_changes_a_thought(self, pair: Pair, model: PeftModel) -> None:
        with recorded_thoughts(model) as thoughts:
            for tail in (" one", " two"):
                model(**pair.batch([QUESTIONS[0] + "<thought>" * 3 + tail]))
        assert torch.equal(thoughts[0], thoughts[1])


class TestLine3WhatComesBack:
    @SIDES
    def test_logits_line_up_with_the_tokens(self, pair: Pair, model: PeftModel, oracle: Oracle, side: str) -> None:
        batch, rows = supervised(pair, side)
        logits = model(**batch).logits
        assert logits.shape[:2] == batch["input_ids"].shape
        for index, (prompt, response) in enumerate(rows):
            want = oracle.logits(prompt, response)
            # the last prompt token's row is the last thought's
            want = torch.cat([want[: len(prompt) - 1], want[len(prompt) + N - 1 :]])
            got = logits[index][batch["attention_mask"][index].bool()]
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)

    @SIDES
    @pytest.mark.parametrize("keep", [1, 5, 1000, torch.tensor([3, 9, 12])], ids=["last", "five", "all", "chosen"])
    def test_logits_to_keep_counts_the_callers_tokens(
        self, pair: Pair, model: PeftModel, side: str, keep: int | Tensor
    ) -> None:
        batch, _ = supervised(pair, side)
        labels = batch["labels"]
        whole = model(**batch).logits
        base = model.get_base_model()
        with pytest.MonkeyPatch.context() as patch:  # the loss needs every row; place by labels without one
            patch.setattr(base, "loss_function", lambda *args, **kwargs: torch.zeros(()))
            kept = base(**{**batch, "labels": labels}, logits_to_keep=keep).logits
        want = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
        torch.testing.assert_close(kept, want, atol=1e-5, rtol=1e-5)

    @SIDES
    @pytest.mark.filterwarnings("ignore:Without `labels`:UserWarning")
    @pytest.mark.parametrize(
        "keep", [1, 5, -5, 1000, torch.tensor([1]), torch.tensor([3, 9, 12])], ids=lambda keep: str(keep)
    )
    def test_logits_to_keep_without_labels(self, pair: Pair, model: PeftModel, side: str, keep: int | Tensor) -> None:
        batch = pair.batch(QUESTIONS, side)
        whole = model(**batch).logits
        want = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
        torch.testing.assert_close(model(**batch, logits_to_keep=keep).logits, want, atol=1e-5, rtol=1e-5)

    def test_hidden_states_and_attentions_line_up(self, pair: Pair) -> None:
        model = pair.model()
        model.get_base_model().set_attn_implementation("eager")
        batch, rows = supervised(pair, "right")
        output = model(**batch, output_hidden_states=True, output_attentions=True)
        length = batch["input_ids"].shape[1]
        for hidden in output.hidden_states:
            assert hidden.shape == (4, length, 32)
        for attention in output.attentions:
            assert attention.shape == (4, 4, length, length)
        # the last hidden states give the logits that came back with them
        head = model.get_base_model().get_output_embeddings()
        torch.testing.assert_close(head(output.hidden_states[-1]), output.logits)
        # queries as the logits' rows, keys without the thoughts
        oracle = Oracle.of(model, pair.base, pair.assistant, N)
        oracle.base.set_attn_implementation("eager")
        for index, (prompt, response) in enumerate(rows):
            states = oracle.states(prompt, response)
            start = len(prompt)
            later = list(range(start + N, start + N + len(response)))
            queries, keys = [*range(start - 1), start + N - 1, *later], [*range(start), *later]
            size = len(keys)
            for layer in range(2):
                want = states.attentions[layer][0][:, queries][:, :, keys]
                got = output.attentions[layer][index, :, :size, :size]
                torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
                want = states.hidden_states[layer][0][queries]
                torch.testing.assert_close(output.hidden_states[layer][index, :size], want, atol=1e-4, rtol=1e-4)

    def test_tuples_line_up(self, pair: Pair, model: PeftModel) -> None:
        batch, _ = supervised(pair, "right")
        want = model(**batch, output_hidden_states=True)
        loss, logits, *_, hidden = model(**batch, output_hidden_states=True, return_dict=False)
        assert torch.equal(loss, want.loss)
        assert torch.equal(logits, want.logits)
        assert all(torch.equal(a, b) for a, b in zip(hidden, want.hidden_states, strict=True))

    def test_shifted_labels_give_the_same_loss(self, pair: Pair, model: PeftModel) -> None:
        batch, _ = supervised(pair, "left")
        want = model(**batch).loss
        shifted = torch.cat([batch["labels"][:, 1:], torch.full((4, 1), -100)], 1)
        base = model.get_base_model()
        logits = base(**{k: batch[k] for k in ("input_ids", "attention_mask")}, shift_labels=shifted).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten())
        torch.testing.assert_close(loss, want, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_generate_returns_scores_states_and_attentions_of_the_callers_tokens(
        self, pair: Pair, num_beams: int
    ) -> None:
        model = pair.model()
        model.get_base_model().set_attn_implementation("eager")
        batch = pair.batch(QUESTIONS[:2])
        output = model.generate(
            **batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=num_beams,
            return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True,
            output_attentions=True,
        )  # fmt: skip
        length, rows = batch["input_ids"].shape[1], 2 * num_beams
        assert output.sequences.shape == (2, length + 5)
        assert len(output.scores) == len(output.logits) == 5
        assert output.hidden_states[0][-1].shape == (rows, length, 32)
        assert output.attentions[0][0].shape == (rows, 4, length, length)
        for step in range(1, 5):
            assert output.hidden_states[step][-1].shape == (rows, 1, 32)
            assert output.attentions[step][0].shape == (rows, 4, 1, length + step)
        if num_beams == 1:
            want = Oracle.of(model, pair.base, pair.assistant, N)
            (row,) = pair.rows(QUESTIONS[1:2])
            before = want.logits(row, output.sequences[1, length:].tolist())
            torch.testing.assert_close(torch.stack(output.logits)[:, 1], before[-6:-1], atol=1e-4, rtol=1e-4)

    def test_max_length_and_min_length_count_the_callers_tokens(
        self, pair: Pair, model: PeftModel, answers: list[list[int]]
    ) -> None:
        batch = pair.batch(QUESTIONS)
        length = batch["input_ids"].shape[1]
        output = model.generate(**batch, max_length=length + NEW, do_sample=False)
        assert new_tokens(output, batch) == answers
        assert output.shape[1] <= length + NEW
        row = batch["input_ids"][:1, batch["attention_mask"][0].bool()]
        options = {"do_sample": False, "eos_token_id": answers[0][3]}
        short = model.generate(row, max_new_tokens=NEW, **options)
        assert short.shape[1] <= row.shape[1] + 4
        for minimum in ({"min_length": row.shape[1] + 7}, {"min_new_tokens": 7}):
            longer = model.generate(row, max_length=row.shape[1] + NEW, **minimum, **options)
            assert longer.shape[1] >= row.shape[1] + 7
            assert answers[0][3] not in longer[0, row.shape[1] : row.shape[1] + 7]
        with pytest.raises(ValueError, match="max_length"):
            model.generate(**batch, max_length=length, do_sample=False)

    def test_a_streamer_sees_prompt_and_new_tokens(
        self, pair: Pair, model: PeftModel, answers: list[list[int]]
    ) -> None:
        class Recorder(BaseStreamer):
            def __init__(self) -> None:
                self.seen: list[int] = []

            def put(self, value: Tensor) -> None:
                self.seen += value.flatten().tolist()

            def end(self) -> None:
                self.seen.append(-1)

        (row,) = pair.rows(QUESTIONS[:1])
        streamer = Recorder()
        model.generate(torch.tensor([row]), max_new_tokens=NEW, do_sample=False, streamer=streamer)
        assert streamer.seen == [*row, *answers[0], -1]

    def test_stop_strings_and_criteria_see_the_callers_tokens(
        self, pair: Pair, model: PeftModel, answers: list[list[int]]
    ) -> None:
        (row,) = pair.rows(QUESTIONS[:1])
        ids = torch.tensor([row])
        seen: list[Tensor] = []

        def stop(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            seen.append(input_ids)
            return torch.tensor([input_ids.shape[1] >= len(row) + 3])

        output = model.generate(ids, max_new_tokens=NEW, do_sample=False, stopping_criteria=[stop])
        assert output[0].tolist() == row + answers[0][:3]
        assert torch.equal(seen[0], torch.tensor([row + answers[0][:1]]))
        pieces = [pair.tokenizer.decode([token]) for token in answers[0]]
        index = next(index for index, piece in enumerate(pieces) if index and piece.isascii())
        output = model.generate(
            ids, max_new_tokens=NEW, do_sample=False, stop_strings=[pieces[index]], tokenizer=pair.tokenizer
        )
        assert output[0].tolist() == row + answers[0][: index + 1]


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


class TestLine6OneAssistantPass:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_cache": False},
            {"num_beams": 3, "num_return_sequences": 3},
            {"do_sample": True, "num_return_sequences": 4},
            {"prefill_chunk_size": 4},
        ],
        ids=["greedy", "uncached", "beams", "samples", "chunked"],
    )
    def test_once_per_generate(self, pair: Pair, model: PeftModel, options: dict[str, Any]) -> None:
        with assistant_passes(model) as calls:
            model.generate(**pair.batch(QUESTIONS), max_new_tokens=5, **{"do_sample": False, **options})
        assert calls == [len(QUESTIONS)]

    def test_once_per_forward_and_never_when_disabled(self, pair: Pair, model: PeftModel) -> None:
        batch, _ = supervised(pair, "right")
        with assistant_passes(model) as calls:
            model(**batch).loss.backward()
            assert calls == [len(QUESTIONS)]
            with model.disable_adapter():
                model(**batch)
                model.generate(**pair.batch(QUESTIONS), max_new_tokens=2)
        assert calls == [len(QUESTIONS)]


class TestTheCallersOwnAssistantInput:
    def own_input(self, pair: Pair, oracle: Oracle) -> dict[str, Tensor]:
        """What the reader would make, made by hand."""
        rows = [oracle.assistant_ids(row) + [0] * N for row in pair.rows(QUESTIONS)]
        width = max(map(len, rows))
        return {
            "assistant_input_ids": torch.tensor([[1] * (width - len(row)) + row for row in rows]),
            "assistant_attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        }

    @SIDES
    def test_it_is_read_instead_of_the_prompt(
        self, pair: Pair, model: PeftModel, oracle: Oracle, answers: list[list[int]], side: str
    ) -> None:
        batch, own = pair.batch(QUESTIONS, side), self.own_input(pair, oracle)
        output = model.generate(**batch, **own, max_new_tokens=NEW, do_sample=False)
        assert new_tokens(output, batch) == answers
        other = {name: value.flip(0) for name, value in own.items()}
        flipped = model.generate(**batch, **other, max_new_tokens=NEW, do_sample=False)
        assert new_tokens(flipped, batch) != answers
        train, rows = supervised(pair, side)
        torch.testing.assert_close(model(**train, **own).loss, oracle_loss(oracle, rows), atol=1e-5, rtol=0)

    @SIDES
    def test_it_makes_embeddings_enough(
        self, pair: Pair, model: PeftModel, oracle: Oracle, answers: list[list[int]], side: str
    ) -> None:
        own = self.own_input(pair, oracle)
        embed = pair.load_base().get_input_embeddings()
        train, rows = supervised(pair, side)
        embeds = embed(train.pop("input_ids"))
        loss = model(inputs_embeds=embeds, **train, **own).loss
        torch.testing.assert_close(loss, oracle_loss(oracle, rows), atol=1e-5, rtol=0)
        batch = pair.batch(QUESTIONS, side)
        output = model.generate(
            inputs_embeds=embed(batch["input_ids"]), attention_mask=batch["attention_mask"], **own,
            max_new_tokens=NEW, do_sample=False,
        )  # fmt: skip
        assert up_to_eos(output.tolist()) == answers

    def test_disabled_ignores_it(self, pair: Pair, model: PeftModel, oracle: Oracle) -> None:
        own = self.own_input(pair, oracle)
        batch = pair.batch(QUESTIONS)
        with model.disable_adapter():
            assert torch.equal(model(**batch, **own).logits, model(**batch).logits)
            model.generate(**batch, **own, max_new_tokens=2)
