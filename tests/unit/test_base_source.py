"""The base as its own thought source: `t = Base([prompt; thought token x N])`, without a second model."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import collate, generated, gradients, labelled, responses_of
from helpers import hooks_of, never_share_prompts, projection_of, source_of
from oracle import Oracle
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from tiny_pair import ANSWERS, QUESTIONS, Pair
from torch import nn
from transformers import AutoModelForCausalLM

from softcot_peft import SoftCoTConfig, compute_thoughts, use_thoughts
from softcot_peft.sources import Prompts

NUM, NEW = 3, 6
TOKEN = "<thought>"


def attach(pair: Pair, base: nn.Module | None = None, **fields: Any) -> PeftModel:
    torch.manual_seed(3)
    options = {"num_thought_tokens": NUM, "init_weights": False, "task_type": "CAUSAL_LM"} | fields
    return get_peft_model(base or pair.load_base(), SoftCoTConfig(thought_source="base", **options)).eval()


def judge(model: nn.Module, pair: Pair) -> Oracle:
    oracle = Oracle.of(model, pair.base, pair.base, NUM, same_ids=True)
    oracle.filler = source_of(model).position_token_id
    return oracle


def check_tokens(model: nn.Module, pair: Pair, oracle: Oracle, **options: Any) -> None:
    for side in ("left", "right"):
        found = generated(model, pair.batch(QUESTIONS, side), NEW, do_sample=False, **options)
        assert found == [oracle.generate(row, NEW) for row in pair.rows(QUESTIONS)]


def columns_run(model: nn.Module) -> list[tuple[int, int]]:
    """Collects the shape of every pass of the base's first layer."""
    shapes: list[tuple[int, int]] = []
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    return shapes


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}]
)
def test_it_writes_the_equations_tokens(
    pair: Pair, options: dict[str, Any], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shared:
        never_share_prompts(monkeypatch)
    model = attach(pair)
    check_tokens(model, pair, judge(model, pair), **options)


def test_its_thoughts_change_tokens_and_depend_on_the_prompt(pair: Pair) -> None:
    model = attach(pair)
    batch = pair.batch(QUESTIONS)
    with model.disable_adapter():
        assert generated(model, batch, NEW) != generated(attach(pair), batch, NEW)
    thoughts: list[torch.Tensor] = []
    source_of(model).register_forward_hook(lambda module, args, output: thoughts.append(output.flatten(0, 1)))
    generated(model, batch, 1)
    assert (thoughts[0][0] - thoughts[0][1]).abs().max() > 0.1


@pytest.mark.parametrize("run", [False, True])
def test_the_prompt_runs_once_in_generate(pair: Pair, run: bool) -> None:
    model = attach(pair, thought_token=TOKEN)
    batch = pair.batch([text + TOKEN * NUM * run for text in QUESTIONS])
    length = batch["input_ids"].shape[1] - NUM * run
    model.generate(**batch, max_new_tokens=1)  # tried here, on two rows
    shapes = columns_run(model)
    model.generate(**batch, max_new_tokens=3, do_sample=False, min_new_tokens=3)
    rows = len(QUESTIONS)
    assert shapes == [(rows, length + NUM), (rows, NUM), (rows, 1), (rows, 1)]


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 4}], ids=["beams", "samples"]
)
def test_beams_and_samples_share_the_prompt(
    pair: Pair, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach(pair)
    batch = pair.batch(QUESTIONS)
    torch.manual_seed(0)
    found = generated(model, batch, NEW, min_new_tokens=NEW, **options)
    never_share_prompts(monkeypatch)
    torch.manual_seed(0)
    assert found == generated(model, batch, NEW, min_new_tokens=NEW, **options)


@pytest.mark.parametrize("ragged", [False, True])
def test_training_steps_have_the_equations_loss_and_run_the_prompts_once(
    pair: Pair, ragged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = range(len(QUESTIONS)) if ragged else [0] * len(QUESTIONS)
    prompts, responses = (
        [values[row] for row in rows] for values in (pair.rows(QUESTIONS), responses_of(pair, ANSWERS))
    )
    batch = collate(labelled(prompts, responses))
    model, one = attach(pair).train(), attach(pair, two_pass_training=False).train()
    oracle = judge(model, pair)
    expected = oracle.mean_loss(zip(prompts, responses, strict=True))
    loss, wanted = gradients(one, batch)
    torch.testing.assert_close(loss.loss, expected, atol=1e-5, rtol=1e-5)
    gradients(model, batch)  # the first batch is tried in one pass, too
    shapes = columns_run(model)
    output, found = gradients(model, batch)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other, atol=2e-5, rtol=1e-4)
    longest, width = max(map(len, prompts)), max(map(len, responses))
    assert shapes == [(len(rows), longest + NUM), (len(rows), NUM + width)]
    never_share_prompts(monkeypatch)
    unshared, _ = gradients(model, batch)
    torch.testing.assert_close(unshared.loss, output.loss, atol=1e-6, rtol=1e-6)


def test_dropout_forbids_sharing(pair: Pair) -> None:
    base = pair.load_base()
    base.config.attention_dropout = 0.1
    model = attach(pair, base).train()
    batch = collate(labelled(pair.rows(QUESTIONS), responses_of(pair, ANSWERS)))
    thoughts: list[torch.Tensor] = []
    source_of(model).register_forward_hook(lambda module, args, output: thoughts.append(output.detach()))
    for _ in range(2):
        model(**batch).loss.backward()
    whole = [found for found in thoughts if len(found) == len(QUESTIONS)]
    torch.testing.assert_close(whole[0], whole[-1], atol=1e-5, rtol=1e-5)  # read in eval mode


def test_base_and_modes_stay_as_they_are(pair: Pair) -> None:
    model = attach(pair).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    batch = collate(labelled(pair.rows(QUESTIONS), responses_of(pair, ANSWERS)))
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
    assert all(module.training for module in model.modules())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rsplit(".", 1)[-1] for name in changed} == {"weight", "bias"}
    assert all("softcot_projection" in name for name in changed)
    assert len(changed) == 2


def load_auto(pair: Pair, folder: Path) -> nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(folder)


def load_bare(pair: Pair, folder: Path) -> nn.Module:
    base = pair.load_base()
    base.load_adapter(str(folder))
    return base


@pytest.mark.parametrize("load", [load_auto, load_bare])
def test_it_is_saved_and_loaded(pair: Pair, tmp_path: Path, load: Callable[[Pair, Path], nn.Module]) -> None:
    model = attach(pair)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["thought_source"] == "base"
    assert saved["assistant_model_name_or_path"] is None
    check_tokens(load(pair, tmp_path).eval(), pair, judge(model, pair))


def test_a_base_of_another_width_is_named(pair: Pair, tmp_path: Path) -> None:
    attach(pair).save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(pair.assistant)
    with pytest.raises(ValueError, match="trained for a base whose embeddings are 32 wide, but this base's are 24"):
        PeftModel.from_pretrained(other, tmp_path)


def test_its_states_are_computed_once(pair: Pair) -> None:
    model = attach(pair)
    batch = pair.batch(QUESTIONS)
    wanted = generated(model, batch, NEW)
    use_thoughts(model, compute_thoughts(model)({"input_ids": pair.rows(QUESTIONS)}))
    with torch.no_grad():
        projection_of(model).weight.mul_(1)  # what is trained is no part of what states depend on
    shapes = columns_run(model)
    assert generated(model, batch, NEW) == wanted
    assert shapes[0][1] == batch["input_ids"].shape[1] + NUM
    other = attach(pair)
    with torch.no_grad():
        other.get_base_model().lm_head.weight.mul_(1)
        other.get_base_model().model.layers[0].mlp.down_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="`assistant_weights` was"):
        use_thoughts(other, compute_thoughts(model)({"input_ids": pair.rows(QUESTIONS)}))


def test_two_adapters_and_another_source_share_a_base(pair: Pair) -> None:
    model = attach(pair)
    model.add_adapter("assistant", pair.config())
    check_tokens(model, pair, judge(model, pair))
    model.set_adapter("assistant")
    oracle = Oracle.of(pair.model(), pair.base, pair.assistant, pair.config().num_thought_tokens)
    assert hooks_of(model).host.layer.active_source().kind == "assistant"
    assert generated(model, pair.batch(QUESTIONS), 1) != [[]] * len(QUESTIONS)
    assert oracle.num == pair.config().num_thought_tokens


@pytest.mark.parametrize(
    ("field", "value"),
    [("assistant_model_name_or_path", "x"), ("assistant_prompt", "{prompt}"), ("assistant_dtype", "bfloat16")],
)
def test_fields_of_an_assistant_contradict_it(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"`{field}` is read by `thought_source='assistant'` alone, got '{value}'"):
        SoftCoTConfig(thought_source="base", **{field: value})


def test_it_reads_on_the_device_of_the_bases_embeddings(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of a data set are on the CPU wherever the base is; the meta device stands for an accelerator."""
    source, read = source_of(attach(pair)), []

    def last_states(ids: torch.Tensor, mask: torch.Tensor, num: int) -> torch.Tensor:
        read.extend([ids.device.type, mask.device.type])
        return torch.zeros(len(ids), num, 4, device=ids.device)

    monkeypatch.setattr(source.backbone, "last_states", last_states)
    monkeypatch.setattr("torch.autocast", lambda kind, enabled: nullcontext())  # does not know the meta device
    ids = torch.tensor([pair.rows(QUESTIONS)[0]])
    states = source.read(Prompts(ids, torch.ones_like(ids), torch.device("meta")), NUM)
    assert [*read, states.device.type] == ["meta"] * 3
