"""What a model scores and writes does not depend on `model.training`."""

from __future__ import annotations

import pytest
import torch
from one_question import ANSWER, PROMPT
from oracle import Oracle
from tiny_pair import Pair

# Scoring and writing, in training and evaluation


@pytest.mark.parametrize("dropout", [0.0])
def test_a_text_s_log_probabilities_do_not_depend_on_the_mode(pair: Pair, dropout: float) -> None:
    model = pair.model(inference_num_thought_tokens=2, two_pass_training=False)
    ids = pair.tokenizer([PROMPT + ANSWER], return_tensors="pt")["input_ids"]
    labels = ids.where(torch.arange(ids.shape[1]) >= len(pair.tokenizer(PROMPT)["input_ids"]), -100)
    scored = [model.train(train)(ids, labels=labels) for train in (True, False)]
    assert torch.equal(scored[0].logits, scored[1].logits)
    before, response = ids[0][labels[0] == -100].tolist(), ids[0][labels[0] != -100].tolist()
    oracle = Oracle.of(model, pair.base, pair.assistant, 4)
    torch.testing.assert_close(scored[0].loss, oracle.loss(before, response), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_a_text_is_written_with_its_own_number_in_both_modes(pair: Pair, train: bool) -> None:
    model = pair.model(inference_num_thought_tokens=2).train(train)
    (prompt,) = pair.rows([PROMPT])
    oracle = Oracle.of(model, pair.base, pair.assistant, 2)
    expected = oracle.generate(prompt, 6)
    ids = torch.tensor([prompt])
    assert model.generate(ids, max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist() == expected
    assert int(model(ids, logits_to_keep=1).logits[0, -1].argmax()) == expected[0]
