"""TRL's `SFTTrainer(peft_config=SoftCoTConfig(...))`: its fused head, its data formats, and what it saves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import IGNORED, collate, gradients, labelled, responses_of
from helpers import assistant_passes, in_training, source_of
from oracle import Oracle
from peft import PeftModel, get_peft_model
from tiny_pair import ANSWERS, QUESTIONS, RUN, Pair
from torch import Tensor
from trainers import losses, sft
from transformers import EvalPrediction, pipeline

from softcot_peft import with_thought_tokens

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

# TRL 1.16 turns it on by default, under the name that transformers 5.23 renames
# TRL's default, which test_what_checkpointing_costs_is_said reads
CHECKPOINTING = "ignore:Gradient checkpointing turns two-pass training off:UserWarning"
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings(CHECKPOINTING),
]

N = 4

Rows = list[tuple[list[int], list[int], list[int]]]  # ids before and after the thoughts, and the response


def plain_data() -> Any:
    """Prompt and completion as text."""
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    return datasets.Dataset.from_list(rows)


def chat_data() -> Any:
    """Prompt and completion as messages."""
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for prompt, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    return datasets.Dataset.from_list(rows)


def plain_rows(pair: Pair) -> Rows:
    """What TRL makes of the plain data: the completion ends with EOS."""
    responses = responses_of(pair, ANSWERS)
    return [(prompt, [], response) for prompt, response in zip(pair.rows(QUESTIONS), responses, strict=True)]


def chat_rows(pair: Pair, run: bool) -> Rows:
    """What TRL makes of the messages, the base's template written by hand."""
    header = pair.rows(["<|end|><|assistant|>"])[0]
    befores = pair.rows([f"<|user|>{question}" for question in QUESTIONS])
    responses = pair.rows([answer + "<|end|>" for answer in ANSWERS])
    if run:
        return [(before, header, response) for before, response in zip(befores, responses, strict=True)]
    return [(before + header, [], response) for before, response in zip(befores, responses, strict=True)]


def oracle_rows(oracle: Oracle, rows: Rows) -> list[Tensor]:
    """Log-probabilities at the positions that predict the responses, one `(R, V)` per row."""
    with torch.no_grad():
        logits = [oracle.logits(before, after + response) for before, after, response in rows]
    return [row[-len(response) - 1 : -1].log_softmax(-1) for row, (_, _, response) in zip(logits, rows, strict=True)]


def oracle_loss(oracle: Oracle, rows: Rows) -> float:
    with torch.no_grad():
        return float(oracle.mean_loss((before, response, after) for before, after, response in rows))


@pytest.mark.parametrize("side", ["left", "right"])
def test_fused_head_lines_up_with_the_users_tokens(side: str, pair: Pair, tmp_path: Path) -> None:
    run = sft(pair, tmp_path, pair.config(), plain_data())
    model, rows = run.model.eval(), plain_rows(pair)
    longest = max(len(before) + len(response) for before, _, response in rows)

    def pad(row: list[int], value: int) -> list[int]:
        fill = [value] * (longest - len(row))
        return fill + row if side == "left" else row + fill

    ids = [before + response for before, _, response in rows]
    labels = [[IGNORED] * len(before) + response for before, _, response in rows]
    batch = {
        "input_ids": torch.tensor([pad(row, 0) for row in ids]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in ids]),
        "labels": torch.tensor([pad(row, IGNORED) for row in labels]),
    }
    with torch.no_grad():
        fused, plain = model(**batch, fused_lm_head=True), model(**batch)
    shape = (len(rows), longest - 1)
    for field in (fused.log_probs, fused.entropy, fused.is_top1, fused.label_mask):
        assert field.shape == shape
    predicted = batch["labels"][:, 1:]
    assert torch.equal(fused.label_mask, predicted != IGNORED)
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    log_probs = oracle_rows(oracle, rows)
    for row, (expected, (_, _, response)) in enumerate(zip(log_probs, rows, strict=True)):
        here = fused.label_mask[row]
        torch.testing.assert_close(
            fused.log_probs[row, here], expected[range(len(response)), response], atol=1e-4, rtol=1e-5
        )
        entropy = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(fused.entropy[row, here], entropy, atol=1e-4, rtol=1e-4)
        assert fused.is_top1[row, here].tolist() == (expected.argmax(-1) == torch.tensor(response)).tolist()
        assert not fused.log_probs[row, ~here].any()
    assert float(fused.loss) == pytest.approx(oracle_loss(oracle, rows), abs=1e-5)
    assert float(fused.loss) == pytest.approx(float(plain.loss), abs=1e-5)


@pytest.mark.parametrize("kind", ["text", "messages", "messages with a run"])
def test_sft_trains_on_the_oracles_loss_and_its_adapter_reloads(kind: str, pair: Pair, tmp_path: Path) -> None:
    config = pair.config(**(RUN if kind == "messages with a run" else {}))
    tokenizer = with_thought_tokens(pair.tokenizer, config) if kind == "messages with a run" else pair.tokenizer
    data = plain_data() if kind == "text" else chat_data()
    rows = plain_rows(pair) if kind == "text" else chat_rows(pair, run=kind == "messages with a run")
    run = sft(pair, tmp_path, config, data, tokenizer, max_steps=12)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    first = oracle_loss(Oracle.of(run.model, pair.base, pair.assistant, N), rows)
    run.train()
    assert losses(run)[0] == pytest.approx(first, abs=1e-4)
    assert losses(run)[-1] < 0.9 * losses(run)[0]
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("softcot_" not in name)

    oracle = Oracle.of(run.model, pair.base, pair.assistant, N)
    assert run.evaluate()["eval_loss"] == pytest.approx(oracle_loss(oracle, rows), abs=1e-5)
    run.save_model(str(tmp_path))
    loaded = PeftModel.from_pretrained(pair.load_base(), tmp_path).eval()
    for prompt, after, _ in rows[:2]:
        ids = torch.tensor([prompt + ([tokenizer.get_vocab()["<thought>"]] * N if after else []) + after])
        expected = oracle.generate(prompt, 6, after)
        for model in (run.model.eval(), loaded):
            assert model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist() == expected
    if kind != "text":
        generator = pipeline("text-generation", str(tmp_path), tokenizer=str(tmp_path))  # TRL saved it there
        prompt, after, _ = rows[0]
        messages = [{"role": "user", "content": QUESTIONS[0]}]
        [output] = generator(messages, max_new_tokens=6, do_sample=False, return_tensors=True)
        new = oracle.generate(prompt, 6, after)
        assert output["generated_token_ids"][-len(new) :] == new


def test_sft_runs_the_assistant_once_per_forward_pass(pair: Pair, tmp_path: Path) -> None:
    run = sft(
        pair, tmp_path, pair.config(), plain_data(), gradient_accumulation_steps=2, per_device_train_batch_size=2
    )
    with assistant_passes(run.model, in_training) as passes:
        run.train()
    assert passes == [False] * 4


# TRL's own: it will not compute logits for `compute_metrics` any more in 2.0
@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_compute_metrics_sees_the_users_tokens_with_the_run_in_the_prompt(pair: Pair, tmp_path: Path) -> None:
    config = pair.config(**RUN)
    run = sft(pair, tmp_path, config, chat_data(), with_thought_tokens(pair.tokenizer, config))
    seen: list[EvalPrediction] = []
    run.compute_metrics = lambda prediction: seen.append(prediction) or {}
    run.evaluate()
    oracle = Oracle.of(run.model, pair.base, pair.assistant, N)
    rows = chat_rows(pair, run=True)
    predicted = torch.tensor(seen[0].predictions).log_softmax(-1)
    for row, labels, expected in zip(predicted, seen[0].label_ids, oracle_rows(oracle, rows), strict=True):
        first, *_, last = (column for column, label in enumerate(labels) if label != IGNORED)
        torch.testing.assert_close(row[first - 1 : last], expected, atol=1e-4, rtol=1e-4)


def test_texts_without_a_prompt_are_refused(pair: Pair, tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"text": question} for question in QUESTIONS])
    run = sft(pair, tmp_path, pair.config(), data)
    with pytest.raises(ValueError, match="train on prompt and completion"):
        run.train()


@pytest.mark.parametrize("placement", ["prompt_end", "thought_token"])
def test_thoughts_behind_the_generation_prompt(placement: str, pair: Pair, tmp_path: Path) -> None:
    """TRL's rows have no generation prompt: thoughts go there by themselves, or where the user writes the run."""
    config = pair.config(thought_token="<thought>", placement=placement)
    tokenizer = with_thought_tokens(pair.tokenizer, config, "generation_prompt")
    data, rows = chat_data(), chat_rows(pair, run=False)
    if placement == "thought_token":
        with pytest.raises(ValueError, match=r"found none in `input_ids`.*where='generation_prompt'.*prompt_end"):
            sft(pair, tmp_path, config, data, tokenizer).train()
        prompts = [
            tokenizer.apply_chat_template(row, add_generation_prompt=True)["input_ids"] for row in data["prompt"]
        ]
        responses = [response for _, _, response in rows]
        ids = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        labels = [[IGNORED] * len(prompt) + end for prompt, end in zip(prompts, responses, strict=True)]
        data = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})
    run = sft(pair, tmp_path, config, data, tokenizer, max_steps=4)
    first = oracle_loss(Oracle.of(run.model, pair.base, pair.assistant, N), rows)
    run.train()
    assert losses(run)[0] == pytest.approx(first, abs=1e-4)
    run.save_model(str(tmp_path))
    oracle = Oracle.of(run.model, pair.base, pair.assistant, N)
    generator = pipeline("text-generation", str(tmp_path), tokenizer=str(tmp_path))
    for question, (before, _, _) in zip(QUESTIONS, rows, strict=True):
        messages = [{"role": "user", "content": question}]
        [output] = generator(messages, max_new_tokens=6, do_sample=False, return_tensors=True)
        new = oracle.generate(before, 6)
        assert output["generated_token_ids"][-len(new) :] == new


PACKED: list[dict[str, Any]] = [
    {"packing": True},
    {"packing": True, "packing_strategy": "bfd_split"},
    {"padding_free": True, "max_length": None},
]


# TRL's own: packing and padding-free want flash attention, which a CPU does not have
@pytest.mark.filterwarnings("ignore:.*(packing|[Pp]adding-free|flash):UserWarning")
@pytest.mark.parametrize("options", PACKED, ids=["packing", "packing with splits", "padding-free"])
def test_packed_batches_are_refused(options: dict[str, Any], pair: Pair, tmp_path: Path) -> None:
    run = sft(pair, tmp_path, pair.config(), plain_data(), **options)
    with pytest.raises(ValueError, match="packed or padding-free"):
        run.train()


def test_what_checkpointing_costs_is_said(pair: Pair, tmp_path: Path) -> None:
    run = sft(pair, tmp_path, pair.config(), plain_data())
    with pytest.warns(UserWarning, match=r"about twice the time.*`gradient_checkpointing=False` \(TRL's trainers"):
        run.train()


def preferences(trainer: Any, settings: Any, model: PeftModel, pair: Pair, folder: Path, **options: Any) -> Any:
    """A trainer on prompts, with two answers each for those that compare them."""
    rows = [{"prompt": "How many", "chosen": " legs have", "rejected": " dogs?"}] * 2
    columns = ["prompt"] if trainer is trl.GRPOTrainer else ["prompt", "chosen", "rejected"]
    defaults = {
        "output_dir": str(folder), "max_steps": 1, "logging_steps": 1, "use_cpu": True, "bf16": False,
        "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    rewards = {"reward_funcs": lambda completions, **_: [float(number) for number in range(len(completions))]}
    return trainer(
        model,
        args=settings(**defaults | options),
        train_dataset=datasets.Dataset.from_list(rows).select_columns(columns),
        processing_class=pair.tokenizer,
        **(rewards if trainer is trl.GRPOTrainer else {}),
    )


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_starts_from_equal_log_probabilities(precomputed: bool, pair: Pair, tmp_path: Path) -> None:
    pair.model(inference_num_thought_tokens=2).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(pair.load_base(), tmp_path / "adapter", is_trainable=True)
    run = preferences(trl.DPOTrainer, trl.DPOConfig, model, pair, tmp_path, precompute_ref_log_probs=precomputed)
    run.train()
    first = next(entry["loss"] for entry in run.state.log_history if "loss" in entry)
    assert first == pytest.approx(math.log(2), abs=1e-4)


# 11: rows that are cut off have no labels; the policy may sample the thought token
GRPO: dict[str, dict[str, Any]] = {
    "cut off": {"mask_truncated_completions": True},
    "thought tokens": {"generation_kwargs": {"suppress_tokens": [i for i in range(300) if i not in (2, 40)]}},
}


@pytest.mark.parametrize("habit", GRPO)
def test_grpo_trains(habit: str, pair: Pair, tmp_path: Path) -> None:
    model = get_peft_model(pair.load_base(), pair.config(thought_token="<thought>"))
    options = {"max_completion_length": 4, "num_generations": 2, "per_device_train_batch_size": 2} | GRPO[habit]
    run = preferences(trl.GRPOTrainer, trl.GRPOConfig, model, pair, tmp_path, **options)
    run.train()
    assert run.state.global_step == 1


@pytest.mark.parametrize("checkpointing", [True, False])
def test_chains_are_trained_by_their_mean_loss(checkpointing: bool, pair: Pair, tmp_path: Path) -> None:
    """The first loss is the mean of the chains' oracles, and the embeddings of all chains move."""
    config = pair.config(num_chains=3, contrastive_weight=0.0)
    run = sft(pair, tmp_path, config, plain_data(), gradient_checkpointing=checkpointing)
    source, rows = source_of(run.model), plain_rows(pair)
    start, expected = source.chains.weight.detach().clone(), []
    for vector in start:
        oracle = Oracle.of(run.model, pair.base, pair.assistant, N)
        oracle.vector = vector
        expected.append(oracle_loss(oracle, rows))
    run.train()
    assert losses(run)[0] == pytest.approx(sum(expected) / 3, abs=1e-4)
    assert (source.chains.weight - start).abs().amax(1).min() > 1e-3
    evaluated = run.evaluate()["eval_loss"]
    oracles = [Oracle.of(run.model, pair.base, pair.assistant, N) for _ in start]
    for oracle, vector in zip(oracles, source.chains.weight.detach(), strict=True):
        oracle.vector = vector
    assert evaluated == pytest.approx(sum(oracle_loss(oracle, rows) for oracle in oracles) / 3, abs=1e-4)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_contrastive_term_reaches_its_gradients(
    checkpointing: bool, weight: float, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL computes its loss from log-probabilities, with the gradients of the loss that the base returns."""
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda values, *args: values)
    config = pair.config(num_chains=3, contrastive_weight=weight)
    changes = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9}
    run = sft(pair, tmp_path, config, plain_data(), gradient_checkpointing=checkpointing, **changes)
    chains = source_of(run.model).chains.weight
    rows = [(before, response) for before, _, response in plain_rows(pair)]
    _, gradients_of = gradients(run.model.train(), collate(labelled(*zip(*rows, strict=True))))
    (expected,) = (gradient for gradient in gradients_of if gradient.shape == chains.shape)
    before = chains.detach().clone()
    run.train()
    torch.testing.assert_close(before - chains.detach(), expected, atol=1e-5, rtol=1e-3)


def test_plain_text_is_trained_on_from_the_marker_on(pair: Pair, tmp_path: Path) -> None:
    marker = "\nAnswer:"
    texts = [question + marker + answer for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    config = pair.config(response_marker=marker)
    run = sft(pair, tmp_path, config, datasets.Dataset.from_dict({"text": texts}))
    responses = responses_of(pair, [marker + answer for answer in ANSWERS])
    rows = [(before, list[int](), response) for before, response in zip(pair.rows(QUESTIONS), responses, strict=True)]
    want = oracle_loss(Oracle.of(run.model, pair.base, pair.assistant, N), rows)
    assert run.evaluate()["eval_loss"] == pytest.approx(want, abs=1e-5)
    run.train()
    # TRL divides by its own count of labels, which includes those that are ignored.
    kept = sum(len(response) for _, _, response in rows)
    counted = sum(len(before) - 1 for before, _, _ in rows) + kept
    assert losses(run)[0] == pytest.approx(want * kept / counted, abs=1e-4)
    want = oracle_loss(Oracle.of(run.model, pair.base, pair.assistant, N), rows)
    assert run.evaluate()["eval_loss"] == pytest.approx(want, abs=1e-5)
