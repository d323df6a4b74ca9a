"""Chains (SoftCoT++): K runs of thoughts for each prompt, each with its own embedding in the assistant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import collate, gradients, labelled, next_logits, responses_of, same, up_to_eos
from helpers import assistant_passes, backbone_of, find_cache, hooks_of, in_training, projection_of, source_of
from oracle import Oracle
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny_pair import ANSWERS, QUESTIONS, RUN, Pair
from torch import Tensor, nn
from trainers import SETTINGS
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from softcot_peft import SoftCoTConfig, compute_thoughts, use_assistant, use_thoughts

NUM, NEW, K = 3, 6, 3
KINDS: dict[str, dict[str, Any]] = {
    "trained": {"chain_init": "trained"},
    "fixed": {"chain_init": "fixed"},
    "chosen": {"chain_init": "fixed", "chain_token_ids": [9, 4, 17]},
    "shared ids": {"chain_init": "trained", "twin": True},
    "run": {"chain_init": "trained", **RUN},
}


def attach(pair: Pair, kind: str = "trained", **fields: Any) -> PeftModel:
    fields = {"num_chains": K, "num_thought_tokens": NUM} | KINDS[kind] | fields
    if fields.pop("twin", False):
        fields["assistant_model_name_or_path"] = str(pair.twin)
    model = pair.model(**fields)
    if source_of(model).chains is not None:
        with torch.no_grad():
            source_of(model).chains.weight.mul_(2)  # of random values: chains differ more
    return model


def judges(model: nn.Module, pair: Pair) -> list[Oracle]:
    """An oracle for each chain."""
    source = source_of(model, None)
    twin = source.config.assistant_model_name_or_path == str(pair.twin)
    found = []
    for chain in range(source.num_chains):
        oracle = Oracle.of(model, pair.base, pair.twin if twin else pair.assistant, NUM, same_ids=twin)
        if source.chains is None:
            oracle.filler = source.chain_token_ids[chain]
        else:
            oracle.vector = source.chains.weight[chain].detach().clone()
        found.append(oracle)
    return found


def prompts_of(pair: Pair, kind: str) -> list[str]:
    return [question + RUN["thought_token"] * NUM * (kind == "run") for question in QUESTIONS]


def tokens_of(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
    output = model.generate(**batch, max_new_tokens=NEW, **options)
    return up_to_eos(output[:, batch["input_ids"].shape[1] :].tolist())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_chain_writes_the_equations_tokens(pair: Pair, kind: str, side: str) -> None:
    model = attach(pair, kind)
    oracles, rows = judges(model, pair), pair.rows(QUESTIONS)
    wanted = [oracle.generate(row, NEW) for row in rows for oracle in oracles]
    assert len({tuple(tokens) for tokens in wanted}) > len(QUESTIONS)  # chains differ
    batch = pair.batch(prompts_of(pair, kind), side)
    assert tokens_of(model, batch, do_sample=False) == wanted
    by_chain = [wanted[chain::K] for chain in range(K)]
    assert tokens_of(model, batch, do_sample=False, chains=1) == by_chain[1]
    some = tokens_of(model, batch, do_sample=False, chains=[2, 0])
    assert [some[::2], some[1::2]] == [by_chain[2], by_chain[0]]


def test_a_prompt_in_the_answers_is_the_callers(pair: Pair) -> None:
    batch = pair.batch(QUESTIONS, "right")
    output = attach(pair).generate(**batch, max_new_tokens=2, do_sample=False)
    assert torch.equal(output[:, : batch["input_ids"].shape[1]], batch["input_ids"].repeat_interleave(K, 0))


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"num_beams": 2, "min_new_tokens": NEW},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 1},
    ],
    ids=str,
)
def test_options_of_generate_apply_to_each_chain(pair: Pair, options: dict[str, Any]) -> None:
    model, batch = attach(pair), pair.batch(QUESTIONS)
    together = tokens_of(model, batch, **options)
    copies = options.get("num_return_sequences", 1)
    for chain in range(K):
        alone = tokens_of(model, batch, chains=chain, **options)
        found = [
            together[(row * K + chain) * copies + copy] for row in range(len(QUESTIONS)) for copy in range(copies)
        ]
        assert found == alone


def test_samples_of_a_chain_differ_and_keep_its_thoughts(pair: Pair) -> None:
    model, batch = attach(pair), pair.batch(QUESTIONS[:1])
    torch.manual_seed(0)
    rows = tokens_of(model, batch, do_sample=True, num_return_sequences=8, min_new_tokens=NEW)
    assert len(rows) == 8 * K
    assert len({tuple(row) for row in rows}) > K


def test_one_prefill_serves_all_samples_and_each_prompt_is_read_once_for_a_chain(pair: Pair) -> None:
    model = attach(pair)
    batch = pair.batch([QUESTIONS[0], QUESTIONS[0], QUESTIONS[1]])
    with assistant_passes(model) as passes:
        model.generate(**batch, max_new_tokens=2, do_sample=True, num_return_sequences=2)
        assert passes == [2 * K]
    with assistant_passes(model) as passes:
        model.generate(**batch, max_new_tokens=2, chains=2)
        assert passes == [2]


def test_generate_keeps_no_gradients(pair: Pair) -> None:
    model = attach(pair)
    with assistant_passes(model, in_training) as passes:
        model.generate(**pair.batch(QUESTIONS), max_new_tokens=1)
    assert passes == [False]


# Training


@pytest.mark.parametrize("two_passes", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_mean_over_chains(pair: Pair, kind: str, two_passes: bool) -> None:
    model = attach(pair, kind, two_pass_training=two_passes, contrastive_weight=0.0).train()
    run = [pair.tokenizer.convert_tokens_to_ids(RUN["thought_token"])] * NUM * (kind == "run")
    prompts, responses = pair.rows(QUESTIONS), responses_of(pair, ANSWERS)
    oracles = judges(model, pair)
    losses = torch.stack([oracle.mean_loss(zip(prompts, responses, strict=True)) for oracle in oracles])
    assert losses.std() > 0.01
    for side in ("left", "right"):
        batch = collate(labelled(prompts, responses, run), side)
        for _ in range(2):  # the first batch is tried
            output, _ = gradients(model, batch)
            torch.testing.assert_close(output.loss, losses.mean(), atol=1e-5, rtol=1e-5)
        assert (output.logits is None) == two_passes
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).loss, losses.mean(), atol=1e-5, rtol=1e-5)
            first = model(**batch, chains=0)
            torch.testing.assert_close(model(**batch).logits, first.logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(first.loss, losses[0], atol=1e-5, rtol=1e-5)
        model.train()
    count = torch.tensor(2 * sum(map(len, responses)))
    half = model(**batch, num_items_in_batch=count).loss
    torch.testing.assert_close(half, losses.mean() / 2, atol=1e-5, rtol=1e-5)


def test_gradients_are_the_equations(pair: Pair) -> None:
    """The gradient of each chain's embedding is that of its own loss, through the frozen assistant."""
    prompts, responses = pair.rows(QUESTIONS), responses_of(pair, ANSWERS)
    batch = collate(labelled(prompts, responses))
    for two_passes in (True, False):
        model = attach(pair, two_pass_training=two_passes, contrastive_weight=0.0).train()
        oracles = judges(model, pair)
        for oracle in oracles:
            oracle.vector.requires_grad_()
            (oracle.mean_loss(zip(prompts, responses, strict=True)) / K).backward()
        gradients(model, batch)
        wanted = torch.stack([oracle.vector.grad for oracle in oracles])
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(source_of(model).chains.weight.grad, wanted, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_contrastive_term_is_the_equations(pair: Pair, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        nn.functional, "dropout", lambda values, share: values * _MASK[: values.shape[-1]] / (1 - share)
    )
    prompts, responses = pair.rows(QUESTIONS)[:rows], responses_of(pair, ANSWERS)[:rows]
    batch = collate(labelled(prompts, responses))
    plain = attach(pair, contrastive_weight=0.0).train()
    oracles = judges(plain, pair)
    terms = []
    for prompt in prompts:
        thoughts = [oracle.thoughts(prompt).detach().flatten() for oracle in oracles]
        dropped = [thought * _MASK[: len(thought)] * 2 for thought in thoughts]
        scores = torch.tensor([[20 * torch.cosine_similarity(t, d, dim=0) for d in dropped] for t in thoughts])
        terms += [-scores[k].log_softmax(0)[k] for k in range(K)]
    term = torch.stack(terms).mean()
    for two_passes in (True, False):
        model = attach(pair, contrastive_weight=0.7, two_pass_training=two_passes).train()
        expected = plain(**batch).loss + 0.7 * term
        torch.testing.assert_close(model(**batch).loss, expected, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(**batch).loss, plain(**batch).loss, atol=1e-5, rtol=1e-5)
        # A batch that is a quarter of an accumulated one adds a quarter of the term
        count = torch.tensor(4 * sum(map(len, responses)))
        quarter = model.train()(**batch, num_items_in_batch=count).loss
        torch.testing.assert_close(quarter, expected / 4, atol=1e-4, rtol=1e-4)


_MASK = (torch.arange(NUM * 32) % 3 != 0).float()


@pytest.mark.parametrize("given", [True, False])
def test_training_moves_the_embeddings_and_not_the_assistant(pair: Pair, given: bool, tmp_path: Path) -> None:
    fields: dict[str, Any] = {}
    if given:  # its weights require gradients, as those of a freshly loaded model do
        assistant = AutoModelForCausalLM.from_pretrained(pair.assistant).train()
        tokenizer = AutoTokenizer.from_pretrained(pair.assistant)
        fields["assistant_model_name_or_path"] = use_assistant(assistant, tokenizer, name="trainable")
    model = attach(pair, **fields)
    assistant = assistant if given else backbone_of(model)
    before = {name: value.clone() for name, value in assistant.state_dict().items()}
    base = {name: value.clone() for name, value in model.state_dict().items() if "softcot" not in name}
    start = source_of(model).chains.weight.detach().clone()
    weights = projection_of(model).weight.detach().clone()
    rows = labelled(pair.rows(QUESTIONS), responses_of(pair, ANSWERS))
    arguments = TrainingArguments(tmp_path, max_steps=3, learning_rate=0.1, **SETTINGS)
    Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()
    assert (source_of(model).chains.weight - start).abs().amax(1).min() > 1e-3
    assert not torch.equal(projection_of(model).weight, weights)
    assert same(before, assistant.state_dict())
    assert all(weight.grad is None for weight in assistant.parameters())
    assert all(weight.requires_grad is given for weight in assistant.parameters())
    assert given is any(module.training for module in assistant.modules())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in base.items())


def test_chains_begin_as_tokens_of_the_assistant(pair: Pair) -> None:
    table = AutoModelForCausalLM.from_pretrained(pair.assistant).get_input_embeddings().weight
    source = source_of(attach(pair, init_weights=True, chain_token_ids=[9, 4, 17]))
    torch.testing.assert_close(source.chains.weight, 2 * table[[9, 4, 17]])  # as `attach` doubles them
    ids = source_of(attach(pair, "fixed")).chain_token_ids
    assert len(set(ids)) == K
    assert all(0 < found < len(table) for found in ids)


def test_a_single_trained_embedding(pair: Pair) -> None:
    model = attach(pair, num_chains=1)
    (oracle,) = judges(model, pair)
    assert tokens_of(model, pair.batch(QUESTIONS)) == [oracle.generate(row, NEW) for row in pair.rows(QUESTIONS)]
    _, found = gradients(model.train(), collate(labelled(pair.rows(QUESTIONS), responses_of(pair, ANSWERS))))
    assert {tuple(gradient.shape) for gradient in found} == {(1, 24), (32, 24), (32,)}


# The contract


@pytest.mark.parametrize("kind", ["trained", "chosen", "fixed"])
def test_they_are_saved_and_loaded(pair: Pair, kind: str, tmp_path: Path) -> None:
    model = attach(pair, kind)
    wanted = tokens_of(model, pair.batch(QUESTIONS))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["chain_token_ids"] == source_of(model).chain_token_ids
    bare = pair.load_base()
    bare.load_adapter(str(tmp_path))
    routes = [
        AutoPeftModelForCausalLM.from_pretrained(tmp_path),
        PeftModel.from_pretrained(pair.load_base(), tmp_path, low_cpu_mem_usage=True),
        bare,
    ]
    for loaded in routes:
        assert tokens_of(loaded.eval(), pair.batch(QUESTIONS)) == wanted


def test_a_pipeline_returns_an_answer_for_each_chain(pair: Pair) -> None:
    model = attach(pair)
    generator = pipeline("text-generation", model=model, tokenizer=pair.tokenizer)
    found = generator(QUESTIONS[0], max_new_tokens=NEW, do_sample=False, return_full_text=False)
    rows = tokens_of(model, pair.batch(QUESTIONS[:1]), do_sample=False)
    texts = pair.tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert [answer["generated_text"] for answer in found] == texts


def test_logits_without_labels_are_the_first_chains(pair: Pair) -> None:
    model, batch = attach(pair), pair.batch(QUESTIONS)
    for chain, oracle in enumerate(judges(model, pair)):
        with torch.no_grad():
            logits = model(**batch, logits_to_keep=1, chains=chain).logits[:, -1]
        wanted = torch.stack([oracle.logits(row, [])[-1] for row in pair.rows(QUESTIONS)])
        torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=2e-4)
        if chain == 0:
            torch.testing.assert_close(next_logits(model, batch), logits)


def test_every_output_has_the_callers_rows(pair: Pair) -> None:
    model = attach(pair)
    batch = collate(labelled(pair.rows(QUESTIONS), responses_of(pair, ANSWERS)))
    wanted = {"output_hidden_states": True, "output_attentions": True}
    model.get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        all_chains, first = model(**batch, **wanted), model(**batch, **wanted, chains=0)
    for name in ("logits", "hidden_states", "attentions"):
        found, expected = all_chains[name], first[name]
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert find_cache(all_chains) is None
    assert find_cache(first) is not None


def test_an_input_of_the_callers_own_is_read_by_each_chain(pair: Pair) -> None:
    model, batch = attach(pair), pair.batch(QUESTIONS)
    ids, mask = source_of(model).reader.read(batch["input_ids"], batch["attention_mask"], NUM)
    own = {"assistant_input_ids": ids, "assistant_attention_mask": mask}
    assert tokens_of(model, batch, **own) == tokens_of(model, batch)


def test_states_of_fixed_chains_are_computed_once(pair: Pair) -> None:
    model, batch = attach(pair, "fixed"), pair.batch(QUESTIONS)
    wanted = tokens_of(model, batch), tokens_of(model, batch, chains=2)
    columns = compute_thoughts(model)({"input_ids": pair.rows(QUESTIONS)})
    use_thoughts(model, columns)
    with assistant_passes(model) as passes:
        assert (tokens_of(model, batch), tokens_of(model, batch, chains=2)) == wanted
    assert passes == []
    with pytest.raises(ValueError, match="`chain_token_ids` was"):
        use_thoughts(attach(pair, "chosen"), columns)


def test_states_of_trained_chains_are_computed_once_for_inference(pair: Pair, tmp_path: Path) -> None:
    model = attach(pair)
    with pytest.raises(ValueError, match="`chain_init` must be 'fixed' for thoughts that are computed once"):
        compute_thoughts(model)
    use_thoughts(model, None)  # nothing to forget
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pair.load_base(), tmp_path).eval()
    columns = compute_thoughts(loaded)({"input_ids": pair.rows(QUESTIONS)})
    use_thoughts(loaded, columns)
    assert tokens_of(loaded, pair.batch(QUESTIONS)) == tokens_of(model, pair.batch(QUESTIONS))


def test_a_disabled_adapter_leaves_the_base_alone(pair: Pair) -> None:
    model, batch = attach(pair), pair.batch(QUESTIONS)
    with model.disable_adapter():
        assert tokens_of(model, batch, chains=0) == tokens_of(pair.load_base(), batch)


# Errors

CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"num_chains": 0}, "`num_chains` must be at least 1, got 0"),
    ({"num_chains": 2, "chain_init": "random"}, "`chain_init` must be one of"),
    ({"num_chains": 2, "chain_token_ids": [1]}, "`chain_token_ids` must be 2 different ids"),
    ({"num_chains": 2, "chain_token_ids": [1, 1]}, "`chain_token_ids` must be 2 different ids"),
    ({"num_chains": 2, "chain_token_ids": [1, -1]}, "`chain_token_ids` must be 2 different ids"),
    ({"chain_token_ids": [1]}, "`chain_token_ids` must be None without chains"),
    ({"contrastive_weight": -1.0}, "`contrastive_weight` must be at least 0"),
    ({"contrastive_weight": float("nan")}, "`contrastive_weight` must be at least 0"),
]


@pytest.mark.parametrize(("fields", "message"), CONTRADICTIONS)
def test_fields_that_contradict_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftCoTConfig(assistant_model_name_or_path="org/assistant", **fields)


@pytest.mark.parametrize("fields", [{"chain_token_ids": "ab"}, {"contrastive_weight": "1"}, {"num_chains": 2.0}])
def test_fields_of_the_wrong_type(fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"`{next(iter(fields))}` must be"):
        SoftCoTConfig(assistant_model_name_or_path="org/assistant", **fields)


def test_chains_need_an_assistant() -> None:
    with pytest.raises(ValueError, match="`num_chains` must be 1 with `thought_source='base'`, got 2"):
        SoftCoTConfig(thought_source="base", num_chains=2)


def test_ids_without_an_embedding(pair: Pair) -> None:
    with pytest.raises(ValueError, match="`chain_token_ids` must have embeddings in the assistant, which has"):
        attach(pair, chain_token_ids=[1, 2, 100_000])


@pytest.mark.parametrize(
    ("chains", "error"),
    [(3, ValueError), (-1, ValueError), ([0, 0], ValueError), ([], ValueError), (True, TypeError), ("0", TypeError)],
)
def test_chains_that_are_not_there(pair: Pair, chains: Any, error: type[Exception]) -> None:
    model, batch = attach(pair), pair.batch(QUESTIONS)
    for call in (model, lambda **inputs: model.generate(**inputs, max_new_tokens=1)):
        with pytest.raises(error, match="`chains` must"):
            call(**batch, chains=chains)


def test_logits_of_several_chains_are_refused(pair: Pair) -> None:
    model, batch = attach(pair), pair.batch(QUESTIONS)
    with pytest.raises(ValueError, match="`chains` must name one chain in a pass without `labels`"):
        model(**batch, chains=[0, 1], logits_to_keep=1)
    with pytest.raises(ValueError, match="the default in training"):
        model.train()(**batch, logits_to_keep=1)
    labels = batch["input_ids"].masked_fill(torch.arange(batch["input_ids"].shape[1]) < 12, -100)
    with pytest.raises(ValueError, match="`use_cache` must not be set"):
        model.eval()(**batch, labels=labels, use_cache=True)


def test_thoughts_of_one_chain_alone(pair: Pair) -> None:
    """A plain adapter answers to `chains=0`."""
    model = pair.model()
    batch = pair.batch(QUESTIONS)
    assert tokens_of(model, batch, chains=0) == tokens_of(model, batch)
    with pytest.raises(ValueError, match="`chains` must name some of the adapter's 1"):
        tokens_of(model, batch, chains=1)
    assert hooks_of(model).host.layer.active_source().num_chains == 1
