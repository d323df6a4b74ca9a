"""The projections that come with the package, against their equations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from batches import collate, generated, gradients, labelled, responses_of
from helpers import next_states, projection_of, soft_thoughts
from peft import PeftModel, get_peft_model
from tiny_pair import ANSWERS, QUESTIONS, Pair
from torch import Tensor, nn

from softcot_peft import SoftCoTConfig

N = 4


def attach(pair: Pair, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    return pair.model(**({"init_weights": True} | fields))


def expected(kind: str, projection: nn.Module, states: Tensor) -> Tensor:
    """`(B, N, H_base)` of states `(B, N, H_source)`, one thought at a time."""
    rows = []
    for row in states:
        thoughts = []
        for place, state in enumerate(row):
            if kind == "mlp":
                hidden = projection.inner.weight @ state + projection.inner.bias
                hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
                thoughts.append(projection.outer.weight @ hidden + projection.outer.bias)
            else:
                own = (projection.weight[place], projection.bias[place]) if kind == "per_position" else None
                weight, bias = own or (projection.weight, projection.bias)
                thoughts.append(weight @ state + bias)
        rows.append(torch.stack(thoughts))
    return torch.stack(rows)


KINDS = ["linear", "mlp", "per_position"]


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_thoughts_are_the_equations(pair: Pair, kind: str, init_weights: bool) -> None:
    model, batch = attach(pair, projection=kind, init_weights=init_weights), pair.batch(QUESTIONS)
    states = next_states(model, batch)
    torch.testing.assert_close(
        soft_thoughts(model, batch), expected(kind, projection_of(model), states), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_they_train_and_are_saved(pair: Pair, tmp_path: Path, kind: str) -> None:
    model, batch = (
        attach(pair, projection=kind).train(),
        collate(labelled(pair.rows(QUESTIONS), responses_of(pair, ANSWERS))),
    )
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    first = None
    for _ in range(4):
        output, found = gradients(model, batch)
        assert all(gradient.abs().max() > 0 for gradient in found)
        optimizer.step()
        first = first or output.loss.item()
    assert output.loss.item() < first
    model.save_pretrained(tmp_path)
    base = pair.load_base()
    base.load_adapter(str(tmp_path))
    prompts = pair.batch(QUESTIONS)
    wanted = generated(model.eval(), prompts, 5)
    assert generated(PeftModel.from_pretrained(pair.load_base(), tmp_path).eval(), prompts, 5) == wanted
    assert generated(base.eval(), prompts, 5) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_zero_begins_with_zero_vectors_and_trains(pair: Pair, kind: str) -> None:
    model = attach(pair, projection=kind, projection_init="zero")
    assert not soft_thoughts(model, pair.batch(QUESTIONS)).any()
    batch = collate(labelled(pair.rows(QUESTIONS), responses_of(pair, ANSWERS)))
    assert any(gradient.abs().max() > 0 for gradient in gradients(model.train(), batch)[1])


@pytest.mark.parametrize("kind", ["linear", "per_position"])
def test_identity_begins_with_the_sources_states(pair: Pair, kind: str) -> None:
    config = {"thought_source": "base", "projection": kind, "projection_init": "identity", "num_thought_tokens": N}
    model = get_peft_model(pair.load_base(), SoftCoTConfig(task_type="CAUSAL_LM", **config)).eval()
    batch = pair.batch(QUESTIONS)
    torch.testing.assert_close(soft_thoughts(model, batch), next_states(model, batch), atol=0, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"thought_source": "base"},
        {"assistant_shares_tokenizer": True},
        {"num_chains": 2},
        {"assistant_prompt": "Hint: {prompt}", "assistant_prefix": "In {num_thought_tokens}:"},
        {"assistant_prompt_between": ["many ", " dogs"]},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_matched_begins_with_the_norm_of_token_embeddings(pair: Pair, kind: str, fields: dict[str, Any]) -> None:
    if "assistant_shares_tokenizer" in fields:
        fields = fields | {"assistant_model_name_or_path": str(pair.twin)}
    options = {"projection": kind, "projection_init": "matched", "num_thought_tokens": N, "task_type": "CAUSAL_LM"}
    if "thought_source" not in fields:
        options |= {"assistant_model_name_or_path": str(pair.assistant)}
    base = pair.load_base()
    norms = base.get_input_embeddings().weight.norm(dim=-1)
    torch.manual_seed(0)
    model = get_peft_model(base, SoftCoTConfig(**options | fields)).eval()
    questions = QUESTIONS[1:2] if "assistant_prompt_between" in fields else QUESTIONS
    found = soft_thoughts(model, pair.batch(questions)).norm(dim=-1).mean()
    assert 0.6 < found / norms.median() < 1.7
    plain = options | fields | {"projection_init": "default"}
    torch.manual_seed(0)
    other = get_peft_model(pair.load_base(), SoftCoTConfig(**plain)).eval()
    last = [projection.outer if kind == "mlp" else projection for projection in map(projection_of, (model, other))]
    ratio = last[0].weight / last[1].weight
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), atol=1e-4, rtol=1e-4)


def test_matched_reads_a_text_with_the_delimiters_of_prompts(pair: Pair) -> None:
    marks = ["<question>", "</question>"]
    model = attach(pair, projection_init="matched", assistant_prompt_between=marks, num_thought_tokens=N)
    norms = model.get_base_model().get_input_embeddings().weight.norm(dim=-1)
    found = soft_thoughts(model, pair.batch([question.join(marks) for question in QUESTIONS])).norm(dim=-1).mean()
    assert 0.6 < found / norms.median() < 1.7


def test_fewer_thoughts_than_maps_use_the_first_ones(pair: Pair) -> None:
    model = attach(pair, projection="per_position", thought_token="<thought>", inference_num_thought_tokens=2)
    batch = pair.batch(QUESTIONS)
    states = next_states(model, batch)
    assert states.shape[1] == 2
    torch.testing.assert_close(
        soft_thoughts(model, batch), expected("per_position", projection_of(model), states), atol=1e-5, rtol=1e-5
    )
    more = pair.batch([text + "<thought>" * (N + 1) for text in QUESTIONS])
    with pytest.raises(ValueError, match=r"has a map for each of 4 thoughts \(`num_thought_tokens`\), got 5"):
        model.generate(**more, max_new_tokens=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projection_init": "identity"}, "needs a source as wide as the base's embeddings, got 24 and 32"),
        (
            {"projection": "mlp", "projection_init": "identity"},
            "needs `projection='linear'` or 'per_position', got 'mlp'",
        ),
        ({"projection_init": "ones"}, r"`projection_init` must be one of \(.*\), got 'ones'"),
        ({"projection_init": "zero", "init_weights": False}, "contradicts `init_weights=False`"),
    ],
)
def test_what_cannot_be_is_said(pair: Pair, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(pair, **fields)
