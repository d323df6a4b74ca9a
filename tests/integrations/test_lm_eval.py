"""lm-evaluation-harness: `HFLM` over an adapter generates the oracle's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Oracle
from tiny_pair import QUESTIONS, Pair
from torch import nn

from softcot_peft import with_thought_tokens

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

NEW = 12
PROMPTS = [*QUESTIONS[:3], "Nine?"]


def requests(stop: list[str]) -> list[Instance]:
    options = {"until": stop, "max_gen_toks": NEW, "do_sample": False}
    return [Instance("generate_until", {}, (prompt, options), index) for index, prompt in enumerate(PROMPTS)]


def oracle_texts(pair: Pair, oracle: Oracle) -> list[str]:
    """Text of the oracle's new tokens, EOS and after left out."""
    return [pair.tokenizer.decode(oracle.generate(row, NEW), skip_special_tokens=True) for row in pair.rows(PROMPTS)]


def evaluated(model: Any, pair: Pair, stop: list[str], **options: Any) -> list[str]:
    harness = HFLM(pretrained=model, tokenizer=pair.tokenizer, **options)
    return harness.generate_until(requests(stop), disable_tqdm=True)


@pytest.fixture(scope="module")
def attached(pair: Pair) -> tuple[nn.Module, list[str]]:
    model = pair.model()
    texts = oracle_texts(pair, Oracle.of(model, pair.base, pair.assistant, 4))
    with model.disable_adapter():
        plain = evaluated(model, pair, [], batch_size=1)
    assert not set(plain) & set(texts)  # thoughts change every answer
    return model, texts


@pytest.mark.parametrize("batch_size", [1, 2])
def test_generate_until_gives_the_oracles_text(
    batch_size: int, pair: Pair, attached: tuple[nn.Module, list[str]]
) -> None:
    model, texts = attached
    assert evaluated(model, pair, [], batch_size=batch_size) == texts


@pytest.mark.parametrize("batch_size", [1, 2])
def test_generate_until_stops_at_the_strings(
    batch_size: int, pair: Pair, attached: tuple[nn.Module, list[str]]
) -> None:
    model, texts = attached
    stop = texts[0][4:6]
    cut = [text.split(stop)[0] for text in texts]
    assert cut[0] != texts[0]
    assert evaluated(model, pair, [stop], batch_size=batch_size) == cut


def test_adapter_given_as_peft_gives_the_oracles_text(
    pair: Pair, attached: tuple[nn.Module, list[str]], tmp_path: Path
) -> None:
    model, texts = attached
    model.save_pretrained(tmp_path)
    options = {"peft": str(tmp_path), "batch_size": 2, "device": "cpu", "dtype": "float32"}
    assert evaluated(str(pair.base), pair, [], **options) == texts


@pytest.mark.parametrize("batch_size", [1, 2])
def test_chats_with_the_run_give_the_oracles_text_and_likelihoods(batch_size: int, pair: Pair) -> None:
    model = pair.model(thought_token="<thought>", placement="thought_token")
    tokenizer = with_thought_tokens(pair.tokenizer, model.peft_config["default"])
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    contexts = [harness.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    oracle = Oracle.of(model, pair.base, pair.assistant, 4)
    befores = pair.rows([f"<|user|>{prompt}" for prompt in PROMPTS])
    [after] = pair.rows(["<|end|><|assistant|>"])

    options = {"until": [], "max_gen_toks": NEW, "do_sample": False}
    texts = harness.generate_until(
        [Instance("generate_until", {}, (context, options), index) for index, context in enumerate(contexts)],
        disable_tqdm=True,
    )
    assert texts == [
        pair.tokenizer.decode(oracle.generate(before, NEW, after), skip_special_tokens=True) for before in befores
    ]

    answers = ["Twelve.", "One hundred.", "Five", "Nine."]
    scores = harness.loglikelihood(
        [
            Instance("loglikelihood", {}, pair_of_texts, index)
            for index, pair_of_texts in enumerate(zip(contexts, answers, strict=True))
        ],
        disable_tqdm=True,
    )
    for before, answer, (score, is_greedy) in zip(befores, pair.rows(answers), scores, strict=True):
        with torch.no_grad():
            rows = oracle.logits(before, after + answer)[-len(answer) - 1 : -1].log_softmax(-1)
        assert score == pytest.approx(float(rows[range(len(answer)), answer].sum()), abs=1e-4)
        assert is_greedy == (rows.argmax(-1).tolist() == answer)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_of_responses_after_a_marker(batch_size: int, pair: Pair) -> None:
    """The harness scores without labels and without a mask, and pads on the right."""
    model = pair.model(response_marker="\nAnswer:")
    oracle = Oracle.of(model, pair.base, pair.assistant, 4)
    harness = HFLM(pretrained=model, tokenizer=pair.tokenizer, batch_size=batch_size)
    contexts = [f"Question: one?\nAnswer: 1\n\nQuestion: {prompt}\nAnswer:" for prompt in PROMPTS]
    befores = pair.rows([context.removesuffix("\nAnswer:") for context in contexts])
    (after,), answers = pair.rows(["\nAnswer:"]), [" Twelve.", " One hundred.", " Five", " Nine."]
    scores = harness.loglikelihood(
        [Instance("loglikelihood", {}, (contexts[row], answer), row) for row, answer in enumerate(answers)],
        disable_tqdm=True,
    )
    for before, answer, (score, is_greedy) in zip(befores, pair.rows(answers), scores, strict=True):
        with torch.no_grad():
            rows = oracle.logits(before, after + answer)[-len(answer) - 1 : -1].log_softmax(-1)
        assert score == pytest.approx(float(rows[range(len(answer)), answer].sum()), abs=1e-4)
        assert is_greedy == (rows.argmax(-1).tolist() == answer)
