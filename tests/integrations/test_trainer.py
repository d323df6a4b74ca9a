"""Training with transformers' `Trainer`: the oracle's loss, one assistant pass per step, nothing moves but W and b."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import IGNORED, collate, labelled, responses_of, same
from helpers import assistant_passes, backbone_of, in_training
from oracle import Oracle
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_pair import ANSWERS, QUESTIONS, RUN, Pair
from torch import Tensor, nn
from trainers import SETTINGS, losses
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    pipeline,
)

from softcot_peft import with_thought_tokens

N = 4

Example = dict[str, list[int]]


def texts(pair: Pair) -> list[tuple[list[int], list[int]]]:
    """Prompts and responses as ids."""
    return list(zip(pair.rows(QUESTIONS), responses_of(pair, ANSWERS), strict=True))


def examples(pair: Pair, middle: list[int] | None = None) -> list[Example]:
    """Labelled texts; `middle` stands between prompt and response."""
    return labelled(pair.rows(QUESTIONS), responses_of(pair, ANSWERS), middle or [])


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Four examples a step, no files, no reports."""
    return TrainingArguments(
        **(
            SETTINGS
            | {"output_dir": str(folder), "max_steps": 6, "learning_rate": 3e-2, "max_grad_norm": 0.0}
            | changes
        )
    )


def trainer(model: nn.Module, pair: Pair, folder: Path, side: str = "right", **changes: Any) -> Trainer:
    own = {name: changes.pop(name) for name in ("compute_metrics", "processing_class") if name in changes}
    data = changes.pop("data", None) or examples(pair)
    return Trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=data,
        eval_dataset=data,
        data_collator=partial(collate, side=side),
        **own,
    )


def projection(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "softcot_" in name}


def check_frozen(model: nn.Module, pair: Pair) -> None:
    """Base and assistant are what their folders hold, bit for bit, and have no gradients."""
    base = pair.load_base().state_dict()
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if "softcot_" not in name
    }
    assert same(found, base)
    assistant = backbone_of(model)
    stored = load_file(pair.assistant / "model.safetensors")
    stored.pop("lm_head.weight")
    assert same({f"model.{name}": tensor for name, tensor in assistant.state_dict().items()}, stored)
    for name, parameter in [*model.named_parameters(), *assistant.named_parameters()]:
        if "softcot_" not in name:
            assert not parameter.requires_grad
            assert parameter.grad is None
    assert not any(module.training for module in assistant.modules())


def oracle_loss(oracle: Oracle, pair: Pair, after: list[int] | None = None) -> Tensor:
    """Mean over all response tokens of the oracle's losses."""
    with torch.no_grad():
        return oracle.mean_loss((prompt, response, after) for prompt, response in texts(pair))


# One batch


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_of_a_batch_is_the_oracles(side: str, mode: str, pair: Pair) -> None:
    model = pair.model().train(mode == "train")
    loss = model(**collate(examples(pair), side)).loss
    expected = oracle_loss(Oracle.of(model, pair.base, pair.assistant, N), pair)
    torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_of_a_batch_with_learned_positions_is_the_oracles(side: str, pair: Pair) -> None:
    base = AutoModelForCausalLM.from_pretrained(pair.twin)  # GPT-2, to which padding shifts what stands where
    model = get_peft_model(base, pair.config()).eval()
    loss = model(**collate(examples(pair), side)).loss
    expected = oracle_loss(Oracle.of(model, pair.twin, pair.assistant, N), pair)
    torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_of_a_batch_with_the_run_in_the_prompt_is_the_oracles(side: str, pair: Pair) -> None:
    model = pair.model(**RUN).train()
    middle = pair.rows(["<thought>" * N + "<|assistant|>"])[0]
    loss = model(**collate(examples(pair, middle), side)).loss
    expected = oracle_loss(Oracle.of(model, pair.base, pair.assistant, N), pair, after=middle[N:])
    torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=0)


def test_gradient_of_the_projection_is_the_oracles(pair: Pair) -> None:
    model = pair.model().train()
    model(**collate(examples(pair), "left")).loss.backward()
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    oracle.weight.requires_grad_()
    oracle.bias.requires_grad_()
    rows = texts(pair)
    total = sum(len(response) for _, response in rows)
    torch.stack([oracle.loss(*row) * len(row[1]) / total for row in rows]).sum().backward()
    found = {name.split(".")[-1]: value.grad for name, value in model.named_parameters() if value.requires_grad}
    torch.testing.assert_close(found, {"weight": oracle.weight.grad, "bias": oracle.bias.grad}, atol=1e-4, rtol=1e-3)


# Trainer


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_lowers_the_loss_and_moves_the_projection_alone(side: str, pair: Pair, tmp_path: Path) -> None:
    model = pair.model()
    before = projection(model)
    first = oracle_loss(Oracle.of(model, pair.base, pair.assistant, N), pair)
    run = trainer(model, pair, tmp_path, side, max_steps=20, learning_rate=6e-2)
    with assistant_passes(model, in_training) as passes:
        run.train()
        assert model.training
    assert passes == [False] * 20
    assert losses(run)[0] == pytest.approx(float(first), abs=1e-4)  # the log rounds to four digits
    assert losses(run)[-1] < 0.9 * losses(run)[0]
    check_frozen(model, pair)
    after = projection(model)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    last = oracle_loss(Oracle.of(model, pair.base, pair.assistant, N), pair)
    assert run.evaluate()["eval_loss"] == pytest.approx(float(last), abs=1e-5)


def test_trainer_takes_a_base_with_an_adapter_added_by_transformers(pair: Pair, tmp_path: Path) -> None:
    base = pair.load_base()
    torch.manual_seed(0)
    base.add_adapter(pair.config())
    run = trainer(base, pair, tmp_path / "base", save_strategy="steps", save_steps=6)
    run.train()
    check_frozen(base, pair)
    peft_run = trainer(pair.model(), pair, tmp_path / "peft")
    peft_run.train()
    assert losses(run) == losses(peft_run)
    loaded = PeftModel.from_pretrained(pair.load_base(), tmp_path / "base" / "checkpoint-6")
    trained = {f"base_model.model.{name}": tensor for name, tensor in projection(base).items()}
    assert same(projection(loaded), trained)


def test_gradient_accumulation_equals_the_larger_batch(pair: Pair, tmp_path: Path) -> None:
    data = examples(pair)
    whole, parts = pair.model(), pair.model()
    start = projection(whole)
    plain = {"optim": "sgd", "max_steps": 3, "learning_rate": 0.1}
    trainer(whole, pair, tmp_path / "whole", data=data, **plain).train()
    run = trainer(
        parts,
        pair,
        tmp_path / "parts",
        data=data,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **plain,
    )
    with assistant_passes(parts, in_training) as passes:
        run.train()
    assert len(passes) == 12  # one per forward pass
    moved = projection(whole)
    assert not any(torch.allclose(moved[name], start[name], atol=1e-3) for name in start)
    torch.testing.assert_close(projection(parts), moved, atol=1e-5, rtol=1e-4)


# transformers 5.23 renames the argument; earlier versions do not know the new name
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool, pair: Pair, tmp_path: Path) -> None:
    plain, saving = pair.model(), pair.model()
    plain_run = trainer(plain, pair, tmp_path / "plain", max_steps=3)
    plain_run.train()
    run = trainer(
        saving,
        pair,
        tmp_path / "saving",
        max_steps=3,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    attention_passes: list[int] = []
    attention = saving.get_base_model().model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda module, args: attention_passes.append(1))
    warns = pytest.warns(UserWarning, match="Gradient checkpointing turns two-pass training off")
    with assistant_passes(saving, in_training) as passes, warns:
        run.train()
    assert len(attention_passes) == 2 * 3  # the base's layers are computed again,
    assert passes == [False] * 3  # the assistant is not
    assert losses(run) == pytest.approx(losses(plain_run), rel=1e-6)
    torch.testing.assert_close(projection(saving), projection(plain), atol=1e-6, rtol=1e-5)
    check_frozen(saving, pair)


def test_compute_metrics_sees_the_users_tokens(pair: Pair, tmp_path: Path) -> None:
    model = pair.model()
    seen: list[EvalPrediction] = []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"count": float(len(seen))}

    run = trainer(
        model, pair, tmp_path, compute_metrics=compute_metrics, eval_strategy="steps", eval_steps=2, max_steps=4
    )
    with assistant_passes(model, in_training) as passes:
        run.train()
    assert len(passes) == 4 + 2  # training steps and evaluation batches
    assert [entry["eval_count"] for entry in run.state.log_history if "eval_count" in entry] == [1.0, 2.0]
    batch = collate(examples(pair))
    vocabulary = model.config.vocab_size
    assert seen[-1].predictions.shape == (*batch["input_ids"].shape, vocabulary)
    assert (seen[-1].label_ids == batch["labels"].numpy()).all()
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    for row, (prompt, response) in zip(torch.tensor(seen[-1].predictions), texts(pair), strict=True):
        with torch.no_grad():
            expected = oracle.logits(prompt, response)
        users = torch.cat([expected[: len(prompt) - 1], expected[len(prompt) - 1 + N :]])
        torch.testing.assert_close(row[: len(users)], users, atol=1e-4, rtol=1e-4)


def test_load_best_model_at_end_brings_the_best_projection_back(pair: Pair, tmp_path: Path) -> None:
    model = pair.model()
    scores = iter([0.2, 0.9, 0.1])
    run = trainer(
        model,
        pair,
        tmp_path,
        compute_metrics=lambda prediction: {"score": next(scores)},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    saved = {step: saved_projection(tmp_path / f"checkpoint-{step}") for step in (2, 4, 6)}
    assert same(without_adapter_name(projection(model)), saved[4])
    assert not same(saved[4], saved[6])
    assert not same(saved[4], saved[2])


def saved_projection(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def without_adapter_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".default", ""): tensor for name, tensor in tensors.items()}


def test_resumed_training_ends_on_the_same_bits(pair: Pair, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.1,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = pair.model()
    trainer(whole, pair, tmp_path / "whole", **settings).train()
    torch.manual_seed(11)
    resumed = pair.model(init_weights=True)  # other weights, which the checkpoint must replace
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert not same(without_adapter_name(projection(resumed)), saved_projection(checkpoint))
    run = trainer(resumed, pair, tmp_path / "resumed", **settings)
    with assistant_passes(resumed, in_training) as passes:
        run.train(resume_from_checkpoint=str(checkpoint))
    assert len(passes) == 3
    assert same(projection(resumed), projection(whole))
    assert not same(without_adapter_name(projection(whole)), saved_projection(checkpoint))


def test_checkpoints_hold_the_adapter_and_the_trainers_state_alone(pair: Pair, tmp_path: Path) -> None:
    model = pair.model()
    trainer(model, pair, tmp_path, save_strategy="steps", save_steps=6).train()
    folder = tmp_path / "checkpoint-6"
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= files
    assert not {"model.safetensors", "pytorch_model.bin", "config.json"} & files
    tensors = saved_projection(folder)
    assert sorted(tuple(tensor.shape) for tensor in tensors.values()) == [(32,), (32, 24)]
    moments = torch.load(folder / "optimizer.pt")["state"]
    assert len(moments) == 2  # nothing else is optimised


def test_saved_run_is_used_as_it_was_trained(pair: Pair, tmp_path: Path) -> None:
    """Chats with the run in the user turn: train, save with the tokenizer, answer in a pipeline."""
    model = pair.model(**RUN)
    tokenizer = with_thought_tokens(pair.tokenizer, model.peft_config["default"])
    data = []
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        response = tokenizer(answer + "<|end|>")["input_ids"]
        data.append({"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response})
    run = trainer(model, pair, tmp_path, data=data, processing_class=tokenizer)
    run.train()
    run.save_model(str(tmp_path))
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    before, after = pair.rows([f"<|user|>{QUESTIONS[1]}", "<|end|><|assistant|>"])
    expected = oracle.generate(before, 8, after)
    generator = pipeline("text-generation", str(tmp_path), tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    messages = [{"role": "user", "content": QUESTIONS[1]}]
    [output] = generator(messages, max_new_tokens=8, do_sample=False, return_tensors=True)
    assert output["generated_token_ids"] == [
        *before,
        *[pair.tokenizer.get_vocab()["<thought>"]] * N,
        *after,
        *expected,
    ]


def test_training_in_bfloat16_autocast_keeps_the_projection_in_float32(pair: Pair, tmp_path: Path) -> None:
    model = pair.model()
    first = oracle_loss(Oracle.of(model, pair.base, pair.assistant, N), pair)
    run = trainer(model, pair, tmp_path, bf16=True, max_steps=20, learning_rate=6e-2)
    run.train()
    assert losses(run)[0] == pytest.approx(float(first), rel=0.05)
    assert losses(run)[-1] < 0.9 * losses(run)[0]
    assert {tensor.dtype for tensor in projection(model).values()} == {torch.float32}
    check_frozen(model, pair)


def test_datasets_with_other_columns_train(pair: Pair, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    listed = trainer(pair.model(), pair, tmp_path / "list", max_steps=3)
    listed.train()
    data = datasets.Dataset.from_list([{**example, "question": "dropped"} for example in examples(pair)])
    run = trainer(pair.model(), pair, tmp_path / "datasets", data=data, max_steps=3)
    run.train()
    assert losses(run) == losses(listed)


# Losses that are computed outside of the model, which then sees no labels


def test_label_smoothing_works_with_the_run_in_the_prompt(pair: Pair, tmp_path: Path) -> None:
    model = pair.model(**RUN)
    middle = pair.rows(["<thought>" * N])[0]
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    nll, smooth = [], []
    for prompt, response in texts(pair):
        with torch.no_grad():
            rows = oracle.logits(prompt, response)[-len(response) - 1 : -1].log_softmax(-1)
        nll.append(-rows[range(len(response)), response])
        smooth.append(-rows.mean(-1))
    expected = 0.9 * torch.cat(nll).mean() + 0.1 * torch.cat(smooth).mean()
    run = trainer(model, pair, tmp_path, data=examples(pair, middle), label_smoothing_factor=0.1, max_steps=2)
    assert run.evaluate()["eval_loss"] == pytest.approx(float(expected), abs=1e-5)
    run.train()
    assert losses(run)[0] == pytest.approx(float(expected), abs=1e-4)


def test_label_smoothing_without_a_run_is_not_silent(pair: Pair, tmp_path: Path) -> None:
    run = trainer(pair.model(), pair, tmp_path, label_smoothing_factor=0.1, max_steps=1)
    with pytest.warns(UserWarning, match="Without `labels`"):
        run.train()


def test_adapter_config_of_a_checkpoint_names_the_assistant(pair: Pair, tmp_path: Path) -> None:
    trainer(pair.model(), pair, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    stored = json.loads((tmp_path / "checkpoint-1" / "adapter_config.json").read_text())
    assert stored["assistant_model_name_or_path"] == str(pair.assistant)
    assert stored["assistant_hidden_size"] == 24
