"""Training on rewards and preferences with TRL's GRPO, DPO and KTO, for every kind of thoughts and of reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from batches import next_logits
from helpers import assistant_of, assistant_passes, backbone_of, is_loaded, projection_of, sources_of
from oracle import Oracle
from peft import PeftModel, get_peft_model
from tiny_pair import ANSWERS, QUESTIONS, RUN, Pair
from torch import Tensor
from trainers import SETTINGS
from transformers import AutoModelForCausalLM

from softcot_peft import compute_thoughts, use_thoughts, with_thought_tokens

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

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
    """The log-probabilities of the policy and of its reference are the oracle's, from one reading per prompt."""
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
    run.train()
    assert len(scored) == 2  # the reference and the policy
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


# DPO and KTO
