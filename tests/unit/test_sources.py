"""Thought sources and projections of one's own: registered by name, nothing in the package changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import collate, generated, labelled, responses_of
from helpers import source_of
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from tiny_pair import ANSWERS, QUESTIONS, Pair
from torch import Tensor, nn
from transformers import PreTrainedModel

from softcot_peft import SoftCoTConfig, compute_thoughts, use_thoughts
from softcot_peft.sources import (
    BaseLM,
    Prompts,
    ThoughtSource,
    projections,
    register_projection,
    register_source,
    source,
)

NUM = 3
WEIGHT = 0.25


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test registers what it needs, and nothing stays."""
    monkeypatch.setattr(source.SOURCES, "classes", dict(source.SOURCES.classes))
    monkeypatch.setattr(projections.PROJECTIONS, "classes", dict(projections.PROJECTIONS.classes))
    return


def register_table() -> type[ThoughtSource]:
    """Thoughts from the prompts' ids, looked up in a trained table."""

    @register_source("table")
    class TableSource(ThoughtSource):
        def __init__(self, config: SoftCoTConfig, base: BaseLM) -> None:
            super().__init__(config, base)
            self.table = nn.Embedding(64, base.hidden_size)

        def read(self, prompts: Prompts, num_thoughts: int) -> Tensor:
            total = (prompts.input_ids * prompts.attention_mask).sum(1)
            rows = (7 * total[:, None] + torch.arange(num_thoughts, device=total.device)) % 64
            return rows[:, None, :, None]

        def project(self, states: Tensor) -> Tensor:
            return self.table(states[..., 0].long())

        def auxiliary_loss(self, thoughts: Tensor) -> Tensor:
            return WEIGHT * thoughts.square().mean()

    return TableSource


def attach(pair: Pair, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    config = SoftCoTConfig(task_type="CAUSAL_LM", thought_source="table", num_thought_tokens=NUM, **fields)
    return get_peft_model(pair.load_base(), config)


def expected(model: nn.Module, base: PreTrainedModel, ids: list[int], num: int = NUM) -> Tensor:
    """`[prompt; thoughts]` of a prompt as embeddings, `(1, L + N, H)`."""
    rows = (7 * sum(ids) + torch.arange(num)) % 64
    thoughts = source_of(model).table(rows)
    return torch.cat([base.get_input_embeddings()(torch.tensor(ids)), thoughts])[None]


def oracle_tokens(model: nn.Module, base: PreTrainedModel, ids: list[int], new: int) -> list[int]:
    """Greedy, every token computed from scratch."""
    embeds, written = expected(model, base, ids), []
    for _ in range(new):
        written.append(int(base(inputs_embeds=embeds).logits[0, -1].argmax()))
        embeds = torch.cat([embeds, base.get_input_embeddings()(torch.tensor(written[-1:]))[None]], 1)
    return written


def trained(pair: Pair) -> PeftModel:
    register_table()
    model = attach(pair).train()
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=50.0)
    batch = collate(labelled(pair.rows(QUESTIONS), responses_of(pair, ANSWERS)))
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


def load_peft(pair: Pair, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(pair.load_base(), folder)


def load_auto(pair: Pair, folder: Path) -> nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(folder)


def load_bare(pair: Pair, folder: Path) -> nn.Module:
    base = pair.load_base()
    base.load_adapter(str(folder))
    return base


@pytest.mark.parametrize("load", [load_peft, load_auto, load_bare])
def test_a_source_of_ones_own_trains_saves_reloads_and_generates(
    pair: Pair, tmp_path: Path, load: Callable[[Pair, Path], nn.Module]
) -> None:
    model = trained(pair)
    base = pair.load_base()
    batch = pair.batch(QUESTIONS)
    with torch.no_grad():
        wanted = [oracle_tokens(model, base, ids, 5) for ids in pair.rows(QUESTIONS)]
        plain = [
            base.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :].tolist()
            for ids in pair.rows(QUESTIONS)
        ]
    assert wanted != plain
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["thought_source"] == "table"
    loaded = load(pair, tmp_path).eval()
    for found in (model, loaded):
        tokens = generated(found, batch, 5, min_new_tokens=5, do_sample=False, eos_token_id=None)
        assert tokens == wanted


@pytest.mark.parametrize("two_pass", [True, False])
def test_the_loss_is_the_nll_and_the_sources_own(pair: Pair, two_pass: bool) -> None:
    register_table()
    model, base = attach(pair, two_pass_training=two_pass), pair.load_base()
    (prompt, response), losses = (pair.rows(QUESTIONS)[0], responses_of(pair, ANSWERS)[0]), {}
    batch = collate(labelled([prompt], [response]))
    with torch.no_grad():
        placed = expected(model, base, prompt)
        embeds = torch.cat([placed, base.get_input_embeddings()(torch.tensor(response))[None]], 1)
        logits = base(inputs_embeds=embeds).logits[0, len(prompt) + NUM - 1 : -1].log_softmax(-1)
        nll = -logits.gather(1, torch.tensor(response)[:, None]).mean()
        own = WEIGHT * placed[0, len(prompt) :].square().mean()
        for mode in (True, False):
            losses[mode] = model.train(mode)(**batch).loss
    torch.testing.assert_close(losses[False], nll, atol=1e-5, rtol=1e-5)  # what is scored has no loss but the NLL
    step = model.train()(**batch)
    assert (step.logits is None) == two_pass
    torch.testing.assert_close(step.loss, nll + own, atol=1e-5, rtol=1e-5)


def test_its_states_are_computed_once_for_a_data_set(pair: Pair) -> None:
    model = trained(pair)
    batch = pair.batch(QUESTIONS)
    wanted = model.generate(**batch, max_new_tokens=4, do_sample=False)
    columns = compute_thoughts(model)({"input_ids": pair.rows(QUESTIONS)})
    use_thoughts(model, columns)
    source_of(model).read = None  # not called any more
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), wanted)


def test_a_file_must_hold_its_tensors_and_nothing_else(pair: Pair, tmp_path: Path) -> None:
    model = trained(pair)
    assert source_of(model).checkpoint_tensors() == {"table.weight": torch.Size([64, 32])}
    model.save_pretrained(tmp_path)
    pair.model().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "adapter_model.safetensors").replace(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"must hold model\.embed_tokens\.softcot_table\.weight"):
        PeftModel.from_pretrained(pair.load_base(), tmp_path)


def test_a_projection_of_ones_own(pair: Pair, tmp_path: Path) -> None:
    @register_projection("small")
    class Small(nn.Sequential):
        def __init__(self, source_size: int, base_size: int, config: SoftCoTConfig) -> None:
            super().__init__(nn.Linear(source_size, 8), nn.GELU(), nn.Linear(8, base_size))

    torch.manual_seed(0)
    model = pair.model(projection="small").train()
    assert {
        name.rsplit("projection.default.", 1)[1] for name, weight in model.named_parameters() if weight.requires_grad
    } == {f"{place}.{part}" for place in (0, 2) for part in ("weight", "bias")}
    batch = collate(labelled(pair.rows(QUESTIONS), responses_of(pair, ANSWERS)))
    model(**batch).loss.backward()
    assert all(weight.grad.abs().max() > 0 for weight in model.parameters() if weight.requires_grad)
    model.save_pretrained(tmp_path)
    prompts = pair.batch(QUESTIONS)
    loaded = PeftModel.from_pretrained(pair.load_base(), tmp_path).eval()
    assert generated(loaded, prompts, 4) == generated(model.eval(), prompts, 4)


@pytest.mark.parametrize(
    ("field", "register"), [("thought_source", "register_source"), ("projection", "register_projection")]
)
def test_an_unknown_name_says_what_is_known(pair: Pair, field: str, register: str) -> None:
    with pytest.raises(ValueError, match=rf"`{field}` must be one of \[.*\], got 'nobody'.*`{register}`"):
        pair.model(**{field: "nobody"})
    with pytest.raises(ValueError, match=f"`{field}` must be the name of a registered one, got ''"):
        SoftCoTConfig(assistant_model_name_or_path="x", **{field: ""})


def test_a_name_is_given_once(pair: Pair) -> None:
    register_table()
    register_table()  # a module that is run again, in a notebook say, registers the same class anew
    with pytest.raises(ValueError, match=r"`name` must be new, got 'table', which .*TableSource has"):
        register_source("table")(type("Other", (ThoughtSource,), {}))


def test_a_source_that_reads_prompts_takes_no_input_for_an_assistant(pair: Pair) -> None:
    register_table()
    model = attach(pair).eval()
    ids = torch.tensor([pair.rows(QUESTIONS)[0]])
    with pytest.raises(ValueError, match="`assistant_input_ids` must not be passed: thought source 'table'"):
        model(ids, logits_to_keep=1, assistant_input_ids=ids)


def test_the_parameters_of_a_source_are_in_its_children(pair: Pair) -> None:
    @register_source("bare")
    class Bare(ThoughtSource):
        def __init__(self, config: SoftCoTConfig, base: BaseLM) -> None:
            super().__init__(config, base)
            self.thought = nn.Parameter(torch.zeros(base.hidden_size))

        def read(self, prompts: Prompts, num_thoughts: int) -> Tensor:
            return torch.zeros(len(prompts.input_ids), 1, num_thoughts, 1)

        def project(self, states: Tensor) -> Tensor:
            return states * self.thought

    config = SoftCoTConfig(task_type="CAUSAL_LM", thought_source="bare")
    with pytest.raises(TypeError, match=r"must be in child modules, but Bare has \['thought'\] of its own"):
        get_peft_model(pair.load_base(), config)


def test_a_source_must_read_and_project(pair: Pair) -> None:
    register_source("neither")(type("Neither", (ThoughtSource,), {}))
    config = SoftCoTConfig(task_type="CAUSAL_LM", thought_source="neither")
    with pytest.raises(TypeError, match=r"abstract class Neither .*project.*read"):
        get_peft_model(pair.load_base(), config)


def test_a_source_must_return_the_chains_that_are_asked_for(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    register_table()
    model = attach(pair).eval()
    source = source_of(model)
    read = source.read
    monkeypatch.setattr(source, "read", lambda *args: read(*args)[:, 0])
    with pytest.raises(ValueError, match=r"must return states of the shape \(B, C, N, H\), here \(4, 1, \d+, H\)"):
        model.generate(**pair.batch(QUESTIONS), max_new_tokens=1)
