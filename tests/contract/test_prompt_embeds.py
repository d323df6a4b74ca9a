"""`prompt_embeds`: another copy of the base, fed with the embeddings, writes what `generate` writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import base_passes, up_to_eos
from helpers import break_assistants, source_of
from oracle import Oracle
from peft import PeftModel, get_peft_model
from tiny_pair import QUESTIONS, RUN, Pair
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from softcot_peft import compute_thoughts, prompt_embeds, use_thoughts

N, NEW, K = 4, 8, 3
MARKER = "\nAnswer:"
SIDES = pytest.mark.parametrize("side", ["left", "right"])
KINDS: dict[str, dict[str, Any]] = {
    "end of the prompt": {},
    "run": RUN,
    "marker": {"response_marker": MARKER},
    "chat": {"assistant_model_name_or_path": "chat_assistant", "assistant_prompt": "{prompt} Think."},
    "shared ids": {"assistant_model_name_or_path": "twin"},
    "base": {"thought_source": "base", "assistant_model_name_or_path": None},
    "other number": {"inference_num_thought_tokens": 2},
    "mlp": {"projection": "mlp"},
    "chains": {"num_chains": K, "chain_init": "trained"},
    "fixed chains": {"num_chains": K, "chain_init": "fixed", **RUN},
}
SMALL: dict[str, Any] = {
    "vocab_size": 330,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,
}


def attach(pair: Pair, kind: str) -> PeftModel:
    fields = dict(KINDS[kind])
    if (name := fields.get("assistant_model_name_or_path")) is not None:
        fields["assistant_model_name_or_path"] = str(getattr(pair, name))
    return pair.model(**fields)


def texts(kind: str) -> list[str]:
    """Prompts of different lengths, after whose thoughts stand no or some tokens, as many as a row's number."""
    if kind == "marker":
        return [f"{question}{MARKER}{' so' * row}" for row, question in enumerate(QUESTIONS)]
    if "run" in kind or kind == "fixed chains":
        return [f"{question}{'<thought>' * N}{' so' * row}" for row, question in enumerate(QUESTIONS)]
    return QUESTIONS


def continued(base: PreTrainedModel, rows: list[Tensor]) -> list[list[int]]:
    """Greedy tokens after embeddings, one row at a time."""
    return [
        up_to_eos(base.generate(inputs_embeds=row[None], max_new_tokens=NEW, do_sample=False).tolist())[0]
        for row in rows
    ]


def written(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
    output = model.generate(**batch, max_new_tokens=NEW, do_sample=False, **options)
    return up_to_eos(output[:, batch["input_ids"].shape[1] :].tolist())


# Equal to `generate`


@SIDES
@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_base_writes_what_generate_writes(pair: Pair, kind: str, side: str) -> None:
    model, batch = attach(pair, kind), pair.batch(texts(kind), side)
    rows = prompt_embeds(model, **batch)
    assert continued(pair.load_base(), rows) == written(model, batch)
    added = 0 if "thought_token" in KINDS[kind] else model.peft_config["default"].inference_num_thought_tokens or N
    lengths = batch["attention_mask"].sum(1).repeat_interleave(K if "chains" in kind else 1)
    assert [tuple(row.shape) for row in rows] == [(length + added, 32) for length in lengths.tolist()]
    assert {(row.dtype, row.requires_grad) for row in rows} == {(torch.float32, False)}


@SIDES
@pytest.mark.parametrize("kind", ["end of the prompt", "run"])
def test_the_rows_are_those_of_the_equations(pair: Pair, kind: str, side: str) -> None:
    model = attach(pair, kind)
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    embed, found = oracle.base.get_input_embeddings(), prompt_embeds(model, **pair.batch(texts(kind), side))
    ends = pair.rows([" so" * row for row in range(len(QUESTIONS))]) if kind == "run" else [[]] * len(QUESTIONS)
    for row, before, after in zip(found, pair.rows(QUESTIONS), ends, strict=True):
        tokens = [embed(torch.tensor(ids, dtype=torch.long)) for ids in (before, after)]
        assert torch.equal(row[: len(before)], tokens[0])
        torch.testing.assert_close(row[len(before) : len(before) + N], oracle.thoughts(before), atol=1e-5, rtol=1e-5)
        assert torch.equal(row[len(before) + N :], tokens[1])


def test_chains_are_adjacent_and_can_be_chosen(pair: Pair) -> None:
    model, batch = attach(pair, "chains"), pair.batch(QUESTIONS)
    every = prompt_embeds(model, **batch)
    for chains in (1, [2, 0], (0, 1, 2)):
        wanted = [chains] if isinstance(chains, int) else chains
        found = prompt_embeds(model, **batch, chains=chains)
        expected = [every[row * K + chain] for row in range(len(QUESTIONS)) for chain in wanted]
        for row, other in zip(found, expected, strict=True):
            torch.testing.assert_close(row, other)
        assert continued(pair.load_base(), found) == written(model, batch, chains=chains)


def test_a_base_in_bfloat16(pair: Pair) -> None:
    base, plain = (AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.bfloat16).eval() for _ in range(2))
    model = get_peft_model(base, pair.config()).eval()
    rows = prompt_embeds(model, **pair.batch(QUESTIONS[:1]))
    assert rows[0].dtype == torch.bfloat16
    assert continued(plain, rows) == written(model, pair.batch(QUESTIONS[:1]))


def test_what_the_assistant_reads_can_be_given(pair: Pair, model: PeftModel) -> None:
    batch = pair.batch(QUESTIONS)
    own = torch.full((len(QUESTIONS), 9), 7) + torch.arange(len(QUESTIONS))[:, None]
    rows = prompt_embeds(model, **batch, assistant_input_ids=own)
    assert continued(pair.load_base(), rows) == written(model, batch, assistant_input_ids=own)
    mask = torch.ones_like(own)
    mask[:, :3] = 0
    masked = prompt_embeds(model, **batch, assistant_input_ids=own, assistant_attention_mask=mask)
    assert not torch.equal(masked[0], rows[0])


@SIDES
def test_without_a_mask_padding_is_found_as_in_generate(pair: Pair, model: PeftModel, side: str) -> None:
    batch = pair.batch(QUESTIONS, side)
    for row, expected in zip(prompt_embeds(model, batch["input_ids"]), prompt_embeds(model, **batch), strict=True):
        assert torch.equal(row, expected)


def test_precomputed_thoughts_are_used(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    model, batch = pair.model(), pair.batch(QUESTIONS)
    expected = prompt_embeds(model, **batch)
    data = datasets.Dataset.from_dict({"input_ids": pair.rows(QUESTIONS)})
    use_thoughts(model, data.map(compute_thoughts(model), batched=True))
    break_assistants(monkeypatch, AssertionError("the assistant was run"))
    for row, other in zip(prompt_embeds(model, **batch), expected, strict=True):
        torch.testing.assert_close(row, other)


def test_the_adapter_that_is_active_counts(pair: Pair) -> None:
    model, batch = pair.model(), pair.batch(QUESTIONS[:1])
    (first,) = prompt_embeds(model, **batch)
    model.add_adapter("other", pair.config(num_thought_tokens=2))
    model.set_adapter("other")
    (second,) = prompt_embeds(model, **batch)
    assert len(first) == len(second) + 2
    assert continued(pair.load_base(), [second]) == written(model, batch)
    assert torch.equal(prompt_embeds(model.get_base_model(), **batch)[0], second)


@pytest.mark.parametrize("training", [True, False])
def test_modes_stay_as_they_are(pair: Pair, training: bool) -> None:
    model = pair.model().train(training)
    rows = prompt_embeds(model, **pair.batch(QUESTIONS))
    assert {module.training for module in model.modules()} == {training}
    assert not rows[0].requires_grad


# Bases that can be fed


def test_the_base_is_tried_once(pair: Pair) -> None:
    model, batch = pair.model(), pair.batch(QUESTIONS)
    with base_passes(model) as passes:
        prompt_embeds(model, **batch)
        prompt_embeds(model, **batch)
    assert passes == [1, 1]


def with_adapter(pair: Pair, base: PreTrainedModel) -> PeftModel:
    torch.manual_seed(0)
    base.name_or_path = str(pair.base)  # whose tokenizer it has
    return get_peft_model(base.eval(), pair.config()).eval()


def test_a_base_that_scales_its_embeddings(pair: Pair) -> None:
    base = AutoModelForCausalLM.from_config(Gemma3TextConfig(**SMALL, sliding_window=8, pad_token_id=0)).eval()
    plain = AutoModelForCausalLM.from_config(base.config).eval()
    plain.load_state_dict(base.state_dict())
    model, batch = with_adapter(pair, base), pair.batch(QUESTIONS)
    assert continued(plain, prompt_embeds(model, **batch)) == written(model, batch)


class IdsAlone(LlamaForCausalLM):
    """Cannot run without ids."""

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if input_ids is None:
            raise TypeError("no ids")
        return super().forward(input_ids=input_ids, **kwargs)


class SearchesIds(LlamaForCausalLM):
    """Finds the ids of the embeddings that it gets."""

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        if inputs_embeds is not None:
            input_ids = torch.cdist(inputs_embeds, self.get_input_embeddings().weight).argmin(-1)
        return super().forward(input_ids=input_ids, **kwargs)


def per_layer_config() -> PretrainedConfig:
    changes = {"vocab_size_per_layer_input": 330, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0]}
    return Gemma3nTextConfig(**SMALL, **changes, **layers, laurel_rank=8, sliding_window=8, pad_token_id=0)


def table_by_layer(_: PretrainedConfig) -> PreTrainedModel:
    """Gemma 3n, with all weights different from zero: what a layer looks up changes its output."""
    base = AutoModelForCausalLM.from_config(per_layer_config())
    with torch.no_grad():
        for weight in base.parameters():
            weight.normal_(std=0.4)
    return base


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (IdsAlone, "IdsAlone reads ids as well: it fails without ids: no ids"),
        (SearchesIds, "SearchesIds reads ids as well: its logits differ"),
        (table_by_layer, "Gemma3nForCausalLM reads ids as well: its logits differ"),
    ],
    ids=["fails", "searches", "table by layer"],
)
def test_a_base_that_reads_ids_as_well_is_refused(
    pair: Pair, make: Callable[[PretrainedConfig], PreTrainedModel], words: str
) -> None:
    model = with_adapter(pair, make(pair.load_base().config))
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            prompt_embeds(model, **pair.batch(QUESTIONS))


# Errors


def test_models_without_an_active_adapter_are_refused(pair: Pair, model: PeftModel) -> None:
    batch = pair.batch(QUESTIONS)
    with model.disable_adapter(), pytest.raises(ValueError, match="must have an active SoftCoT adapter, but its"):
        prompt_embeds(model, **batch)
    with pytest.raises(ValueError, match="`model` must have a SoftCoT adapter, got LlamaForCausalLM without one"):
        prompt_embeds(pair.load_base(), **batch)
    with pytest.raises(TypeError, match="`model` must be a model, got str"):
        prompt_embeds("my-adapter", **batch)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"input_ids": [[5, 6]]}, TypeError, "`input_ids` must be a tensor, got list"),
        ({"input_ids": None}, ValueError, "`input_ids` must be given, got none"),
        ({"input_ids": torch.ones(1, 3)}, TypeError, "`input_ids` must be a tensor of torch.int64"),
        ({"input_ids": torch.tensor([5, 6])}, ValueError, "`input_ids` must have the shape"),
        ({"input_ids": torch.tensor([[5, 10**6]])}, ValueError, "must lie within the base's vocabulary"),
        ({"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 3)}, ValueError, "shape of the tokens"),
        ({"input_ids": torch.tensor([[5, 6]]), "chains": 1}, ValueError, "`chains` must name some of the adapter's 1"),
        ({"input_ids": torch.tensor([[5, 6]]), "chains": "0"}, (TypeError, ValueError), "`chains` must"),
        (
            {"input_ids": torch.tensor([[5, 6]]), "assistant_input_ids": torch.ones(1, 2, dtype=torch.long)},
            ValueError,
            "`assistant_input_ids`",
        ),
        (
            {"input_ids": torch.tensor([[5, 6]]), "assistant_attention_mask": torch.ones(1, 9)},
            ValueError,
            "`assistant_attention_mask` is the mask of `assistant_input_ids`",
        ),
    ],
)
def test_wrong_arguments_are_refused(model: PeftModel, changes: dict[str, Any], kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        prompt_embeds(model, **changes)


def test_prompts_must_hold_what_the_placement_asks_for(pair: Pair) -> None:
    for kind, words in (
        ("run", "run of `thought_token`|thought"),
        ("marker", "`response_marker` must occur in every"),
    ):
        with pytest.raises(ValueError, match=words):
            prompt_embeds(attach(pair, kind), **pair.batch(QUESTIONS))


def test_prompts_and_thoughts_must_fit_into_the_base(pair: Pair) -> None:
    config = GPT2Config(vocab_size=330, n_embd=32, n_layer=1, n_head=2, n_positions=20, bos_token_id=1, eos_token_id=1)
    model = with_adapter(pair, AutoModelForCausalLM.from_config(config))
    ids = torch.full((1, 17), 30)
    assert len(prompt_embeds(model, ids[:, 1:])[0]) == 20
    with pytest.raises(ValueError, match="must fit into the base's 20 positions, got 17 \\+ 4"):
        prompt_embeds(model, ids)


def test_a_projection_that_was_never_loaded_is_refused(pair: Pair) -> None:
    model = pair.model(inference_mode=True)
    assert source_of(model).config.inference_mode
    with pytest.raises(ValueError, match="must be loaded before inference"):
        prompt_embeds(model, **pair.batch(QUESTIONS))
