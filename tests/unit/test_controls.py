"""The controls change the thoughts in the way that their names say, and nothing else; the figures are right."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from batches import CLOSE, next_logits
from oracle import Oracle
from peft import PeftModel
from project_files import load_example
from tiny_pair import QUESTIONS, Pair
from torch import Tensor

N, NEW = 4, 5


@pytest.fixture(scope="module")
def controls() -> ModuleType:
    return load_example("controls")


def expected(oracle: Oracle, row: list[int], thoughts: Tensor) -> Tensor:
    """The next token's logits after a prompt and these thoughts."""
    embeds = torch.cat([oracle.base.get_input_embeddings()(torch.tensor(row)), thoughts])
    with torch.no_grad():
        return oracle.base(inputs_embeds=embeds[None]).logits[0, -1]


def test_each_control_writes_what_its_name_says(
    pair: Pair, controls: ModuleType, model: PeftModel, oracle: Oracle
) -> None:
    rows, batch = pair.rows(QUESTIONS), pair.batch(QUESTIONS)
    own = [oracle.thoughts(row).detach() for row in rows]
    average = torch.stack(own).mean(0)
    torch.testing.assert_close(controls.average_thoughts(model, pair.tokenizer, QUESTIONS), average, **CLOSE)
    wanted = {
        "soft thoughts": own,
        "no thoughts": [own[0][:0]] * 4,
        "zero vectors": [torch.zeros_like(own[0])] * 4,
        "another question's": [own[-1], *own[:-1]],
        "average": [average] * 4,
    }
    for control, thoughts in wanted.items():
        with controls.controlled(model, control, average=average):
            found = next_logits(model, batch)
        for row, changed, one in zip(rows, thoughts, found, strict=True):
            torch.testing.assert_close(one, expected(oracle, row, changed), **CLOSE)
    assert set(wanted) | {"random projection"} == set(controls.CONTROLS)


def test_a_random_projection_is_another_one_for_each_seed(pair: Pair, controls: ModuleType, model: PeftModel) -> None:
    batch, state = pair.batch(QUESTIONS), torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        with controls.controlled(model, "random projection", seed=seed):
            found.append(next_logits(model, batch))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    assert not torch.allclose(found[0], next_logits(model, batch))
    assert torch.equal(torch.get_rng_state(), state)


def test_controls_hold_while_generating_and_leave_nothing_behind(
    pair: Pair, controls: ModuleType, model: PeftModel
) -> None:
    batch = pair.batch(QUESTIONS)
    before = model.generate(**batch, max_new_tokens=NEW)
    with controls.controlled(model, "zero vectors"):
        zero = model.generate(**batch, max_new_tokens=NEW)
        assert torch.equal(zero, model.generate(**batch, max_new_tokens=NEW, use_cache=False))
    assert not torch.equal(zero, before)
    with pytest.raises(KeyError), controls.controlled(model, "zero vectors"):
        raise KeyError
    assert torch.equal(model.generate(**batch, max_new_tokens=NEW), before)


def test_what_a_control_needs_is_asked_for(pair: Pair, controls: ModuleType, model: PeftModel) -> None:
    with pytest.raises(ValueError, match="`control` must be one of"), controls.controlled(model, "nothing"):
        pass
    with pytest.raises(ValueError, match="`average` must be given"), controls.controlled(model, "average"):
        pass
    with (
        controls.controlled(model, "another question's"),
        pytest.raises(ValueError, match="two rows or more, got one"),
    ):
        next_logits(model, pair.batch(QUESTIONS[:1]))


def test_thoughts_are_read_off_in_batches(pair: Pair, controls: ModuleType, model: PeftModel, oracle: Oracle) -> None:
    found = controls.thoughts_of(model, pair.tokenizer, QUESTIONS, batch=3)
    assert found.shape == (4, N, 32)
    for row, one in zip(pair.rows(QUESTIONS), found, strict=True):
        torch.testing.assert_close(one, oracle.thoughts(row).detach(), **CLOSE)


def test_similarity_tells_collapsed_thoughts_from_different_ones(controls: ModuleType) -> None:
    same = torch.randn(1, N, 8).expand(3, -1, -1) * torch.tensor([1.0, 2.0, 5.0])[:, None, None]
    torch.testing.assert_close(controls.similarity(same), torch.ones(3, 3))
    across = torch.eye(8)[: 2 * N].view(2, N, 8)
    torch.testing.assert_close(controls.similarity(across), torch.eye(2))


def test_a_token_s_embedding_is_nearest_to_itself(pair: Pair, controls: ModuleType, model: PeftModel) -> None:
    table = model.get_base_model().get_input_embeddings().weight.detach()
    ids = torch.tensor([[7, 20, 300], [8, 9, 10]])
    found = controls.nearest_tokens(model, pair.tokenizer, 3 * table[ids], count=2)
    assert [[ranked[0] for ranked in row] for row in found] == [
        pair.tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()
    ]
    lengths = controls.norms(model, 3 * table[None])
    assert lengths["ratio"] == pytest.approx(3, rel=1e-5)


def test_attention_to_thoughts_is_that_of_their_columns(
    pair: Pair, controls: ModuleType, model: PeftModel, oracle: Oracle
) -> None:
    model.get_base_model().set_attn_implementation("eager")
    (prompt,) = pair.rows(QUESTIONS[:1])
    token = pair.tokenizer.convert_tokens_to_ids("<thought>")
    ids = torch.tensor([[*prompt, *[token] * N, 7, 8, 9]])
    found = controls.attention_to_thoughts(model, ids, token)
    assert found.shape == (2, 3)
    oracle.base.set_attn_implementation("eager")
    with torch.no_grad():
        judged = oracle.states(prompt, [7, 8, 9]).attentions
    start = len(prompt)
    for layer, shares in zip(judged, found, strict=True):
        torch.testing.assert_close(shares, layer[0, :, -3:, start : start + N].sum(-1).mean(0), **CLOSE)
    with pytest.raises(ValueError, match="one row with a run"):
        controls.attention_to_thoughts(model, torch.tensor([prompt]), token)
    model.get_base_model().set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        controls.attention_to_thoughts(model, ids, token)
