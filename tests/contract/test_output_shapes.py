"""Outputs have the shape of the inputs: logits, states, `generate`, scores, streamers, processors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from batches import new_tokens, supervised
from oracle import Oracle
from peft import PeftModel
from tiny_pair import QUESTIONS, RUN, Pair
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

N = 4
NEW = 10
SIDES = pytest.mark.parametrize("side", ["left", "right"])


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

    @pytest.mark.parametrize("count", [1, 4], ids=["one row", "rows"])
    @pytest.mark.parametrize("kind", ["inserted", "run of thought_token", "disabled", "base as source"])
    def test_generate_multiplies_the_head_once(self, pair: Pair, kind: str, count: int) -> None:
        """PyTorch multiplies a frozen head with a slice row by row, and on CPUs copies the head for each row."""
        own = {"thought_source": "base", "assistant_model_name_or_path": None}
        model = pair.model(**{"run of thought_token": RUN, "base as source": own}.get(kind, {}))
        texts = [text + "<thought>" * N * (kind == "run of thought_token") for text in QUESTIONS[:count]]
        given: list[Tensor] = []
        head = model.get_base_model().get_output_embeddings()
        with model.disable_adapter() if kind == "disabled" else nullcontext():
            model.generate(**pair.batch(texts), max_new_tokens=1)  # tries what the base can do
            head.register_forward_pre_hook(lambda head, args: given.append(args[0]))
            model.generate(**pair.batch(texts), max_new_tokens=3)
        assert [len(states) for states in given] == [count] * 3
        for states in given:
            assert states.stride(0) == states.stride(1) * states.shape[1], "PyTorch folds no other strides"

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
