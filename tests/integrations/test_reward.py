"""Training on rewards and preferences with TRL's GRPO, DPO and KTO, for every kind of thoughts and of reference."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batches import next_logits
from helpers import assistant_of, assistant_passes, backbone_of, break_assistants, is_loaded, projection_of, sources_of
from oracle import Oracle
from peft import PeftModel
from tiny_pair import ANSWERS, QUESTIONS, RUN, Pair
from torch import Tensor
from trainers import SETTINGS
from transformers import AutoModelForCausalLM

from softcot_peft import compute_thoughts, use_thoughts, with_thought_tokens

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
vllm_generation = pytest.importorskip("trl.generation.vllm_generation")

# TRL 1.16 turns checkpointing on by default, under the name that transformers 5.23 renames
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.usefixtures("nothing_given"),
]
N = 4
GROUP = 16  # samples of a prompt
COMMON = SETTINGS | {"bf16": False, "gradient_checkpointing": False}


def check_frozen(model: PeftModel, pair: Pair) -> None:
    """Base and assistant are what their folders hold, bit for bit."""
    own = {k.replace(".base_layer", ""): v for k, v in model.get_base_model().state_dict().items()}
    states = [({k: v for k, v in own.items() if "softcot_" not in k}, pair.load_base().state_dict())]
    if is_loaded(assistant_of(model)):
        assistant = AutoModelForCausalLM.from_pretrained(pair.assistant)
        states.append((backbone_of(model).state_dict(), assistant.model.state_dict()))
    for found, expected in states:
        assert found.keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def logged(trainer: Any, name: str) -> list[float]:
    """The values that a trainer logged under a name."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def precompute(model: PeftModel, rows: Any) -> None:
    """The active adapter's thoughts, computed from the tokens of prompts; its assistant is released."""
    use_thoughts(model, rows.map(compute_thoughts(model), batched=True))


# GRPO: the right answer to a question begins with an even or an odd id, in turns


def reward(completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float]:
    return [float(ids[0] % 2 == number % 2) for number, ids in zip(row, completion_ids, strict=True)]


def expected_reward(model: PeftModel, pair: Pair) -> float:
    """The mean reward of infinitely many samples."""
    probabilities = next_logits(model, pair.batch(QUESTIONS)).softmax(-1)
    return sum(float(row[number % 2 :: 2].sum()) for number, row in enumerate(probabilities)) / len(QUESTIONS)


def grpo(pair: Pair, folder: Path, model: Any, tokenizer: Any = None, **changes: Any) -> Any:
    """A trainer of four prompts with a group each per step."""
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS] if tokenizer else QUESTIONS
    settings = COMMON | {
        "output_dir": str(folder), "max_steps": 25, "learning_rate": 6e-2, "num_generations": GROUP,
        "per_device_train_batch_size": GROUP * len(QUESTIONS), "max_completion_length": 2,
    }  # fmt: skip
    return trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=trl.GRPOConfig(**settings | changes),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts, "row": range(len(QUESTIONS))}),
        processing_class=tokenizer or pair.tokenizer,
    )


def test_grpo_improves_its_reward_by_the_same_steps_with_precomputed_thoughts(pair: Pair, tmp_path: Path) -> None:
    trained = {}
    for kind in ("live", "precomputed"):
        model = pair.model()
        if kind == "precomputed":
            precompute(model, datasets.Dataset.from_dict({"input_ids": pair.rows(QUESTIONS)}))
        before = expected_reward(model, pair)
        grpo(pair, tmp_path, model).train()
        after = expected_reward(model.eval(), pair)
        assert before < 0.5
        assert after > 0.7
        assert is_loaded(assistant_of(model)) == (kind == "live")
        check_frozen(model, pair)
        trained[kind] = projection_of(model).weight
    assert torch.equal(trained["live"], trained["precomputed"])


@pytest.mark.parametrize("kind", ["automatic", "run"])
def test_grpo_scores_completions_by_the_thoughts_that_sampled_them(
    kind: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log-probabilities of the policy and of its reference are the oracle's."""
    model = pair.model(**RUN if kind == "run" else {})
    tokenizer = with_thought_tokens(pair.tokenizer, model.peft_config["default"]) if kind == "run" else None
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    run = grpo(pair, tmp_path, model, tokenizer, beta=0.1, max_steps=1)
    scored: list[tuple[Tensor, Tensor, Tensor]] = []
    score = run._get_per_token_logps_and_entropies

    def record(policy: Any, ids: Tensor, mask: Tensor, *args: Any, **options: Any) -> Any:
        found = score(policy, ids, mask, *args, **options)
        scored.append((ids, mask, found[0].detach()))
        return found

    monkeypatch.setattr(run, "_get_per_token_logps_and_entropies", record)
    with assistant_passes(run.model) as passes:
        run.train()
    assert len(passes) == 3  # to sample, for the reference, and to score
    assert len(scored) == 2
    run_id = pair.tokenizer.convert_tokens_to_ids("<thought>")
    for ids, mask, log_probs in scored:
        width = log_probs.shape[1]
        for row, attended, found in zip(ids, mask.bool(), log_probs, strict=True):
            prompt, new = row[:-width][attended[:-width]].tolist(), row[-width:][attended[-width:]].tolist()
            place = prompt.index(run_id) if kind == "run" else len(prompt)
            after = prompt[place + N :] if kind == "run" else []
            logits = oracle.logits(prompt[:place], after + new)[-len(new) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(new)), new]
            torch.testing.assert_close(found[: len(new)], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_sampling_with_vllm_is_refused_before_anything_is_sampled(
    mode: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL merges adapters into the weights that it sends to the engine, which is not there and is never asked."""
    info = {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def start(engine: Any) -> None:
        engine.vllm_client = SimpleNamespace(get_server_info=lambda: info)

    monkeypatch.setattr(vllm_generation.VLLMGeneration, "_init_vllm", start)
    run = grpo(pair, tmp_path, pair.model(), use_vllm=True, vllm_mode=mode)
    with pytest.raises(ValueError, match=r"cannot be merged.*set `use_vllm=False`.* without thoughts"):
        run.train()


def test_sampling_with_continuous_batching_is_refused(pair: Pair, tmp_path: Path) -> None:
    run = grpo(pair, tmp_path, pair.model(), use_transformers_continuous_batching=True)
    with pytest.raises(ValueError, match="`generate_batch` must not be called with an active SoftCoT adapter"):
        run.train()


# DPO and KTO: each question's own answer is preferred to the next question's

TRAINERS = {"dpo": (trl.DPOTrainer, trl.DPOConfig), "kto": (trl.KTOTrainer, trl.KTOConfig)}
# Reference, whether its log-probabilities are computed before training, and whether thoughts are
CASES = [
    ("a copy", False, False),  # an adapter trained before: TRL adds its copy as a second adapter
    ("a copy", False, True),
    ("a copy", True, False),
    ("a copy", True, True),
    ("the base", False, False),  # an adapter made by the trainer, which disables it
    ("the base", True, True),
    ("another model", False, False),
]


def preferences(method: str) -> Any:
    """Pairs of answers, or answers with labels."""
    others = ANSWERS[1:] + ANSWERS[:1]
    if method == "dpo":
        return datasets.Dataset.from_dict({"prompt": QUESTIONS, "chosen": ANSWERS, "rejected": others})
    labels = [True] * len(ANSWERS) + [False] * len(others)
    return datasets.Dataset.from_dict({"prompt": QUESTIONS * 2, "completion": ANSWERS + others, "label": labels})


def comparing(method: str, reference: str, pair: Pair, folder: Path, **changes: Any) -> Any:
    """A trainer with all rows in every step."""
    trainer, settings = TRAINERS[method]
    options = COMMON | {
        "output_dir": str(folder), "max_steps": 10, "learning_rate": 2e-2, "beta": 0.1,
        "per_device_train_batch_size": len(preferences(method)),
    }  # fmt: skip
    given: dict[str, Any] = {"model": pair.model()}
    if reference == "the base":
        torch.manual_seed(0)
        given = {"model": pair.load_base(), "peft_config": pair.config()}
    elif reference == "another model":
        given["ref_model"] = pair.load_base()
    return trainer(
        **given,
        args=settings(**options | changes),
        train_dataset=preferences(method),
        processing_class=pair.tokenizer,
    )


def log_probabilities(model: Any, pair: Pair, rows: list[dict[str, Any]], name: str) -> Tensor:
    """By the equations, of one column of completions after their prompts; without an adapter, by the base."""
    oracle = Oracle.of(model, pair.base, pair.assistant, N) if isinstance(model, PeftModel) else None
    found = []
    for row in rows:
        prompt, new = row["prompt_ids"], row[name]
        with torch.no_grad():
            logits = oracle.logits(prompt, new) if oracle else model(torch.tensor([prompt + new])).logits[0]
        found.append(logits[-len(new) - 1 : -1].log_softmax(-1)[range(len(new)), new].sum())
    return torch.stack(found)


def ratios(run: Any, pair: Pair, reference: Any, name: str) -> Tensor:
    """The log-probabilities of the policy less those of the reference."""
    rows = list(run.train_dataset)
    return log_probabilities(run.model, pair, rows, name) - log_probabilities(reference, pair, rows, name)


def expected_loss(method: str, run: Any, pair: Pair, reference: Any) -> float:
    """The loss of a step with all rows."""
    if method == "dpo":
        better, worse = (ratios(run, pair, reference, name) for name in ("chosen_ids", "rejected_ids"))
        return float(-(0.1 * (better - worse)).sigmoid().log().mean())
    shift = ratios(run, pair, reference, "KL_completion_ids").mean().clamp(min=0)
    signs = torch.tensor([1.0 if label else -1.0 for label in run.train_dataset["label"]])
    return float((1 - (0.1 * signs * (ratios(run, pair, reference, "completion_ids") - shift)).sigmoid()).mean())


def margin(method: str, run: Any, pair: Pair) -> float:
    """By how much preferred answers are more likely than others."""
    rows = list(run.train_dataset)
    if method == "dpo":
        better, worse = (log_probabilities(run.model, pair, rows, name) for name in ("chosen_ids", "rejected_ids"))
    else:
        found, label = (
            log_probabilities(run.model, pair, rows, "completion_ids"),
            torch.tensor(run.train_dataset["label"]),
        )
        better, worse = found[label], found[~label]
    return float((better - worse).mean())


@pytest.mark.parametrize("method", TRAINERS)
@pytest.mark.parametrize(("reference", "log_probs", "thoughts"), CASES)
def test_preferred_answers_gain(
    method: str,
    reference: str,
    log_probs: bool,
    thoughts: bool,
    pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = comparing(method, reference, pair, tmp_path, precompute_ref_log_probs=log_probs)
    assert sorted(sources_of(run.model)) == (["default", "ref"] if reference == "a copy" else ["default"])
    if thoughts:
        for adapter in reversed(sources_of(run.model)):
            run.model.set_adapter(adapter)
            precompute(run.model, run.train_dataset)
        break_assistants(monkeypatch, RuntimeError("the assistant ran"))
    first = expected_loss(method, run, pair, run.model if reference == "a copy" else pair.load_base())
    before = margin(method, run, pair)
    run.train()
    assert logged(run, "loss")[0] == pytest.approx(first, abs=1e-4)
    assert logged(run, "loss")[-1] < 0.95 * first
    assert before < -5
    assert margin(method, run, pair) > 0
    assert is_loaded(assistant_of(run.model)) == (not thoughts)
    check_frozen(run.model, pair)
