"""The controls change the thoughts in the way that their names say, and nothing else; the figures are right."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import next_logits
from helpers import source_of
from oracle import Oracle
from peft import PeftModel
from tiny_pair import QUESTIONS, Pair
from torch import Tensor

from softcot_peft import analysis, live_rows

N, NEW = 4, 5
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture
def model(pair: Pair) -> PeftModel:
    return pair.model(thought_token="<thought>")


@pytest.fixture
def oracle(pair: Pair, model: PeftModel) -> Oracle:
    return Oracle.of(model, pair.base, pair.assistant, N)


def expected(oracle: Oracle, row: list[int], thoughts: Tensor) -> Tensor:
    """The next token's logits after a prompt and these thoughts."""
    embeds = torch.cat([oracle.base.get_input_embeddings()(torch.tensor(row)), thoughts])
    with torch.no_grad():
        return oracle.base(inputs_embeds=embeds[None]).logits[0, -1]


def test_each_control_writes_what_its_name_says(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    rows, batch = pair.rows(QUESTIONS), pair.batch(QUESTIONS)
    own = [oracle.thoughts(row).detach() for row in rows]
    mean = torch.stack(own).mean(0)
    torch.testing.assert_close(analysis.mean_thoughts(model, pair.tokenizer, QUESTIONS), mean, **CLOSE)
    wanted = {
        "own": own,
        "none": [own[0][:0]] * 4,
        "zero": [torch.zeros_like(own[0])] * 4,
        "other_question": [own[-1], *own[:-1]],
        "mean": [mean] * 4,
    }
    for control, thoughts in wanted.items():
        with analysis.with_thoughts(model, control, mean=mean):
            found = next_logits(model, batch)
        for row, changed, one in zip(rows, thoughts, found, strict=True):
            torch.testing.assert_close(one, expected(oracle, row, changed), **CLOSE)
    assert set(wanted) | {"random_projection"} == set(analysis.CONTROLS)


def test_a_random_projection_is_another_one_for_each_seed(pair: Pair, model: PeftModel) -> None:
    batch, state = pair.batch(QUESTIONS), torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        with analysis.with_thoughts(model, "random_projection", seed=seed):
            found.append(next_logits(model, batch))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    assert not torch.allclose(found[0], next_logits(model, batch))
    assert torch.equal(torch.get_rng_state(), state)


def test_controls_hold_while_generating_and_leave_nothing_behind(pair: Pair, model: PeftModel) -> None:
    batch = pair.batch(QUESTIONS)
    before = model.generate(**batch, max_new_tokens=NEW)
    with analysis.with_thoughts(model, "zero"):
        zero = model.generate(**batch, max_new_tokens=NEW)
        assert torch.equal(zero, model.generate(**batch, max_new_tokens=NEW, use_cache=False))
    assert not torch.equal(zero, before)
    with pytest.raises(KeyError), analysis.with_thoughts(model, "zero"):
        raise KeyError
    assert torch.equal(model.generate(**batch, max_new_tokens=NEW), before)


def test_what_a_control_needs_is_asked_for(pair: Pair, model: PeftModel) -> None:
    with pytest.raises(ValueError, match="`control` must be one of"), analysis.with_thoughts(model, "nothing"):
        pass
    with pytest.raises(ValueError, match="`mean` must be given"), analysis.with_thoughts(model, "mean"):
        pass
    with (
        analysis.with_thoughts(model, "other_question"),
        pytest.raises(ValueError, match="two rows or more, got one"),
    ):
        next_logits(model, pair.batch(QUESTIONS[:1]))


def test_thoughts_are_read_off_in_batches(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    found = analysis.collect_thoughts(model, pair.tokenizer, QUESTIONS, batch_size=3)
    assert found.shape == (4, N, 32)
    for row, one in zip(pair.rows(QUESTIONS), found, strict=True):
        torch.testing.assert_close(one, oracle.thoughts(row).detach(), **CLOSE)


def test_thoughts_of_a_chain_are_read_off(pair: Pair) -> None:
    model = pair.model(num_chains=3, num_thought_tokens=N)
    first, second, third = (analysis.collect_thoughts(model, pair.tokenizer, QUESTIONS, chain=k) for k in range(3))
    assert torch.equal(first, analysis.collect_thoughts(model, pair.tokenizer, QUESTIONS))
    assert not any(torch.allclose(one, other) for one, other in ((first, second), (first, third), (second, third)))
    judge = Oracle.of(model, pair.base, pair.assistant, N)
    for chain, found in enumerate((first, second, third)):
        judge.vector = source_of(model).chains.weight[chain].detach()
        for row, one in zip(pair.rows(QUESTIONS), found, strict=True):
            torch.testing.assert_close(one, judge.thoughts(row).detach(), **CLOSE)
    mean = analysis.mean_thoughts(model, pair.tokenizer, QUESTIONS, chain=2)
    torch.testing.assert_close(mean, third.mean(0), **CLOSE)
    with pytest.raises(ValueError, match="`chains` must name some of the adapter's 3"):
        analysis.collect_thoughts(model, pair.tokenizer, QUESTIONS, chain=3)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["7", "8", "8"], "8"),
        (["7", "8", "8", "7"], "7"),  # equally frequent: the first
        (["", None, "", None, "7"], "7"),
        (["0"], "0"),
        (("b", "a"), "b"),
        ([None, ""], None),
        ([], None),
    ],
)
def test_the_most_frequent_answer_wins(answers: list[str | None], winner: str | None) -> None:
    assert analysis.majority_vote(answers) == winner


@pytest.mark.parametrize(
    ("answers", "message"),
    [("77", "must be a list of strings, got str"), (["7", 7], "must be strings or None, got 7")],
)
def test_what_cannot_vote_is_refused(answers: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"`answers` {message}"):
        analysis.majority_vote(answers)


def test_similarity_tells_collapsed_thoughts_from_different_ones() -> None:
    same = torch.randn(1, N, 8).expand(3, -1, -1) * torch.tensor([1.0, 2.0, 5.0])[:, None, None]
    torch.testing.assert_close(analysis.thought_similarity(same), torch.ones(3, 3))
    across = torch.eye(8)[: 2 * N].view(2, N, 8)
    torch.testing.assert_close(analysis.thought_similarity(across), torch.eye(2))
    torch.testing.assert_close(analysis.thought_similarity(same, "positions").diagonal(), torch.ones(N))
    torch.testing.assert_close(analysis.thought_similarity(across, "positions"), torch.eye(N))
    one, other = torch.randn(2, 2, 8)
    expected = torch.stack([torch.cosine_similarity(v[:, None], v[None], dim=-1) for v in (one, other)]).mean(0)
    torch.testing.assert_close(analysis.thought_similarity(torch.stack([one, other]), "positions"), expected)
    with pytest.raises(ValueError, match="`between` must be 'questions' or 'positions', got 'layers'"):
        analysis.thought_similarity(across, "layers")


def test_a_token_s_embedding_is_nearest_to_itself(pair: Pair, model: PeftModel) -> None:
    table = model.get_base_model().get_input_embeddings().weight.detach()
    ids = torch.tensor([[7, 20, 300], [8, 9, 10]])
    found = analysis.nearest_tokens(model, pair.tokenizer, 3 * table[ids], count=2)
    assert [[ranked[0] for ranked in row] for row in found] == [
        pair.tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()
    ]
    scored = analysis.nearest_tokens(model, pair.tokenizer, 3 * table[ids], count=2, similarities=True)
    assert [[[token for token, _ in ranked] for ranked in row] for row in scored] == found
    values = torch.tensor([[[value for _, value in ranked] for ranked in row] for row in scored])
    torch.testing.assert_close(values[..., 0], torch.ones(2, 3))
    second = torch.cosine_similarity(table[ids][:, :, None], table, dim=-1).topk(2).values[..., 1]
    torch.testing.assert_close(values[..., 1], second)
    lengths = analysis.thought_norms(model, 3 * table[None])
    assert lengths["ratio"] == pytest.approx(3, rel=1e-5)


def test_attention_to_thoughts_is_that_of_their_columns(pair: Pair, model: PeftModel, oracle: Oracle) -> None:
    model.get_base_model().set_attn_implementation("eager")
    (prompt,) = pair.rows(QUESTIONS[:1])
    token = pair.tokenizer.convert_tokens_to_ids("<thought>")
    ids = torch.tensor([[*prompt, *[token] * N, 7, 8, 9]])
    found = analysis.attention_to_thoughts(model, ids, token)
    assert found.shape == (2, 3)
    oracle.base.set_attn_implementation("eager")
    with torch.no_grad():
        judged = oracle.states(prompt, [7, 8, 9]).attentions
    start = len(prompt)
    heads = analysis.attention_to_thoughts(model, ids, token, per_head=True)
    assert heads.shape == (2, 4, 3)
    for layer, of_heads in zip(judged, heads, strict=True):
        torch.testing.assert_close(of_heads, layer[0, :, -3:, start : start + N].sum(-1), **CLOSE)
    for layer, shares in zip(judged, found, strict=True):
        torch.testing.assert_close(shares, layer[0, :, -3:, start : start + N].sum(-1).mean(0), **CLOSE)
    with pytest.raises(ValueError, match="one row with a run"):
        analysis.attention_to_thoughts(model, torch.tensor([prompt]), token)
    with pytest.raises(ValueError, match=f"of the adapter's `thought_token`, {token}, got 7.$"):
        analysis.attention_to_thoughts(model, ids, 7)
    unmarked = pair.model()
    with pytest.raises(ValueError, match=r"`thought_token`, None, got .*Set `thought_token` in the adapter's config"):
        analysis.attention_to_thoughts(unmarked, ids, token)
    model.get_base_model().set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        analysis.attention_to_thoughts(model, ids, token)


def test_a_bare_base_has_the_same_controls(pair: Pair, model: PeftModel, tmp_path: Path) -> None:
    """As transformers' `load_adapter` attaches adapters."""
    model.save_pretrained(tmp_path)
    base, batch = pair.load_base(), pair.batch(QUESTIONS)
    base.load_adapter(str(tmp_path))
    mean = analysis.mean_thoughts(base, pair.tokenizer, QUESTIONS)
    for control in analysis.CONTROLS:
        with analysis.with_thoughts(model, control, mean):
            expected = next_logits(model, batch)
        with analysis.with_thoughts(base, control, mean):
            assert torch.equal(next_logits(base, batch), expected), control
    assert torch.equal(next_logits(base, batch), next_logits(model, batch))


def test_inputs_that_cannot_be_meant_are_refused(pair: Pair, model: PeftModel) -> None:
    with pytest.raises(TypeError, match="`prompts` must be a list of strings, got str"):
        analysis.collect_thoughts(model, pair.tokenizer, QUESTIONS[0])
    with pytest.raises(ValueError, match="`prompts` must hold at least one prompt, got none"):
        analysis.collect_thoughts(model, pair.tokenizer, [])
    runs = [QUESTIONS[0] + "<thought>" * number for number in (2, 3)]
    with pytest.raises(ValueError, match=r"one number of thoughts, got \[2, 3\]"):
        analysis.collect_thoughts(model, pair.tokenizer, runs, batch_size=1)
    short = torch.zeros(N - 1, 32)
    with (
        analysis.with_thoughts(model, "mean", short),
        pytest.raises(ValueError, match=r"of the thoughts, \(4, 32\), got \(3, 32\)"),
    ):
        next_logits(model, pair.batch(QUESTIONS))
    with model.disable_adapter(), pytest.raises(ValueError, match="must have an active SoftCoT adapter, got disabled"):
        analysis.collect_thoughts(model, pair.tokenizer, QUESTIONS)
    with (
        pytest.raises(ValueError, match="`model` must have a SoftCoT adapter"),
        analysis.with_thoughts(pair.load_base(), "zero"),
    ):
        pass


def test_token_embeddings_are_compared_as_the_base_reads_them(pair: Pair, model: PeftModel) -> None:
    """Some embeddings scale what they look up, as Gemma 3's do."""
    thoughts = torch.randn(2, N, 32)
    before = analysis.thought_norms(model, thoughts)
    model.get_input_embeddings().base_layer.register_forward_hook(lambda module, args, output: 3 * output)
    after = analysis.thought_norms(model, thoughts)
    assert after["tokens"] == pytest.approx(3 * before["tokens"], rel=1e-5)
    assert after["ratio"] == pytest.approx(before["ratio"] / 3, rel=1e-5)


EXAMPLES = {
    f"{module.__name__}.{name}": code
    for module in (analysis, live_rows)
    for name, member in inspect.getmembers(module)
    if (getattr(member, "__module__", None) or "").startswith(module.__name__)
    for code in re.findall(r"```python\n(.*?)```", member.__doc__ or "", flags=re.DOTALL)
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_in_docstrings_run(
    pair: Pair, model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(EXAMPLES[name]), {"model": model, "tokenizer": pair.tokenizer, "prompts": QUESTIONS})


def test_public_helpers_have_examples() -> None:
    assert len(EXAMPLES) == 7
