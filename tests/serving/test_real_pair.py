"""The tokens of `generate` over HTTP for pretrained models: Qwen2.5-Coder-0.5B-Instruct and SmolLM2-135M-Instruct."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from served import BASE, Served, Server, message, skip_without_vllm
from tiny_pair import Pair
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from softcot_peft import with_thought_tokens

skip_without_vllm()
if "SOFTCOT_MODELS" not in os.environ:
    pytest.skip("needs pretrained models: `make serving MODELS=FOLDER`", allow_module_level=True)

MARK = "<|box_start|>"  # a special token of Qwen's
NEW, STEPS = 24, 10
PROMPTS = [
    "How many legs have seven dogs? Think step by step.",
    "A train leaves at 9:40 and arrives at 13:05. How long does it travel?",
    "Write a Python function that returns the n-th Fibonacci number.",
]
KINDS: dict[str, dict[str, Any]] = {
    "own": {},
    "prompted": {"assistant_prompt": "Note what matters in {num_thought_tokens} tokens.\n\n{prompt}"},
    "run": {"thought_token": MARK, "placement": "thought_token"},
}


class RealPair(Pair):
    """A pair of pretrained models; the base in float32."""

    def load_base(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()


def train(model: PeftModel, tokenizer: PreTrainedTokenizerBase, answer: str) -> None:
    """Have an adapter begin its answers in a way of its own; fresh thoughts end them at once, whatever the adapter."""
    prompt = tokenizer.apply_chat_template(message(PROMPTS[0]), add_generation_prompt=True, return_dict=True)
    response = tokenizer(answer)["input_ids"]
    ids = torch.tensor([prompt["input_ids"] + response])
    labels = torch.tensor([[-100] * len(prompt["input_ids"]) + response])
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Served:
    models, root = Path(os.environ["SOFTCOT_MODELS"]).absolute(), tmp_path_factory.mktemp("real")
    base, assistant = models / "qwen2.5-coder-0.5b", models / "smollm2-135m"
    pair = RealPair(base, assistant, assistant, base, AutoTokenizer.from_pretrained(base))
    thoughts = {"num_thought_tokens": 8, "init_weights": True, "projection_init": "matched"}
    kinds = {**KINDS, "shared": {"assistant_model_name_or_path": str(base)}}
    for name, changes in kinds.items():
        model = pair.model(**thoughts, **changes)
        marked = "thought_token" in changes
        config = model.peft_config["default"]
        tokenizer = with_thought_tokens(pair.tokenizer, config) if marked else pair.tokenizer
        train(model, tokenizer, f"The adapter {name} says: let us think.")
        model.save_pretrained(root / name)
        if marked:
            tokenizer.save_pretrained(root / name)
    return Served(pair, {name: root / name for name in kinds})


@pytest.fixture(scope="module")
def real_server(real: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(real, tmp_path_factory.mktemp("real_server") / "log") as server:
        yield server


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("name", [BASE, "own", "prompted", "shared"])
def test_answers_are_those_of_generate(real: Served, real_server: Server, name: str, chat: bool) -> None:
    for prompt in PROMPTS:
        expected = real.answer(name, real.ids(prompt, chat), NEW)
        for stream in (False, True):
            answer = real_server.ask(name, prompt, chat, stream, max_tokens=NEW)
            assert answer["tokens"] == expected
            assert answer["usage"]["prompt_tokens"] == len(real.ids(prompt, chat))


def test_thoughts_stand_in_the_user_turn(real: Served, real_server: Server) -> None:
    for prompt in PROMPTS:
        expected = real.answer("run", real.ids(prompt, chat=True, name="run"), NEW)
        assert real_server.ask("run", prompt, chat=True, max_tokens=NEW)["tokens"] == expected


def test_adapters_and_base_at_once(real: Served, real_server: Server) -> None:
    """16 clients; thoughts that reached another request would change its answer."""
    names = [BASE, "own", "shared", "prompted"]
    asked = [(name, prompt) for prompt in PROMPTS for name in names] * 2
    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(lambda each: real_server.ask(*each, chat=True, max_tokens=NEW)["tokens"], asked))
    assert found == [real.answer(name, real.ids(prompt, chat=True), NEW) for name, prompt in asked]
    answers = {each: tuple(tokens) for each, tokens in zip(asked, found, strict=True)}
    assert len({tuple(answers[name, prompt] for prompt in PROMPTS) for name in names}) == len(names)
