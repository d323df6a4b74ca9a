"""What the tests of serving share: a tiny pair with adapters, vLLM's server in a process, and requests to it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from project_files import ROOT
from tiny_pair import QUESTIONS, RUN, Pair, make_pair
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.server import LocalServer
from softcot_peft import with_thought_tokens

BASE = "tiny"  # the base's name in requests
NEW = 16  # tokens of an answer
LENGTH = 256  # of prompt, thoughts and answer in the engine
LONG = " ".join(QUESTIONS) + " What is nine less four?"  # several blocks of the engine's cache
PROMPTS = [*QUESTIONS, LONG]
TWINS = {"first": {}, "second": {}}  # adapters that differ in their projections alone
RUN_TEXT = "<thought>" * 3


def skip_without_vllm() -> None:
    """Skip a test module where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; `make serving` runs these tests", allow_module_level=True)


def message(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


@dataclass(eq=False)
class Served:
    """A pair, and folders of its adapters by name."""

    pair: Pair
    adapters: dict[str, Path]

    @cache  # noqa: B019  # one for the session
    def model(self, name: str) -> PeftModel:
        return PeftModel.from_pretrained(self.pair.load_base(), self.adapters[name]).eval()

    @cache  # noqa: B019
    def answer(self, name: str, ids: tuple[int, ...], new: int = NEW) -> list[int]:
        """The new tokens of `generate`, greedily."""
        model, row = self.model(next(iter(self.adapters)) if name == BASE else name), torch.tensor([ids])
        with model.disable_adapter() if name == BASE else contextlib.nullcontext(), torch.no_grad():
            out = model.generate(
                input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=new, do_sample=False
            )
        return out[0, len(ids) :].tolist()

    def ids(self, prompt: str, chat: bool = False, name: str = BASE) -> tuple[int, ...]:
        tokenizer = self.pair.tokenizer
        if not chat:
            return tuple(tokenizer(prompt)["input_ids"])
        if name == "run":
            tokenizer = with_thought_tokens(tokenizer, self.model(name).peft_config["default"])
        return tuple(
            tokenizer.apply_chat_template(message(prompt), add_generation_prompt=True, return_dict=True)["input_ids"]
        )


def make_served(root: Path) -> Served:
    """A base with heads of 32, which vLLM's attention on CPUs asks for, and adapters of every kind that is served."""
    pair = make_pair(root)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(pair.tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(pair.base)
    kinds: dict[str, dict[str, Any]] = {
        **TWINS,
        "shared": {"assistant_model_name_or_path": str(pair.twin)},
        "chatting": {"assistant_model_name_or_path": str(pair.chat_assistant), "assistant_prompt": "Hint: {prompt}"},
        "run": RUN,
    }
    adapters = {}
    for number, (name, changes) in enumerate(kinds.items()):
        model = pair.model(**changes)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data += 0.5 * number * torch.randn_like(weight)
        model.save_pretrained(root / name)
        adapters[name] = root / name
    marked = with_thought_tokens(pair.tokenizer, model.peft_config["default"])
    marked.save_pretrained(adapters["run"])
    adapters["failing"] = root / "failing"  # with the thought source of serve.py
    shutil.copytree(adapters["first"], adapters["failing"])
    config = adapters["failing"] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"thought_source": "failing"}))
    return Served(pair, adapters)


class Server(LocalServer):
    """vLLM's server with adapters, on loopback.

    Args:
        served: The pair and its adapters.
        log: File for what it prints.
        options: Its command line, beside what every test needs.
        adapters: Value of `SOFTCOT_ADAPTERS`; `None`: all of the pair's.
        environment: Other environment variables; `None` removes one.
    """

    def __init__(
        self,
        served: Served,
        log: Path,
        options: list[str] | None = None,
        adapters: str | None = None,
        environment: dict[str, str | None] | None = None,
    ) -> None:
        named = ",".join(f"{name}={path}" for name, path in served.adapters.items())
        changed = {
            "VLLM_PLUGINS": "softcot",
            "SOFTCOT_ADAPTERS": named if adapters is None else adapters,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
            **(environment or {}),
        }
        command = [sys.executable, str(ROOT / "tests/serve.py"), "--model", str(served.pair.base)]
        command += ["--served-model-name", BASE, "--dtype", "float32", "--enforce-eager"]
        command += ["--max-model-len", str(LENGTH), "--block-size", "32", "--enable-prompt-embeds", *(options or [])]
        super().__init__([part for part in command if part], log, changed)

    def fails(self) -> str:
        """What the server prints before it ends by itself."""
        try:
            assert self.process.wait(240) != 0
        finally:
            self.stop()
        return self.printed()

    def ask(self, name: str, prompt: str, chat: bool = False, stream: bool = False, **options: Any) -> dict[str, Any]:
        """An answer: its `tokens`, `text`, `usage` and `model`."""
        body: dict[str, Any] = {
            "model": name,
            "max_tokens": NEW,
            "temperature": 0,
            "return_token_ids": True,
            **options,
        }
        body |= {"messages": message(prompt)} if chat else {"prompt": prompt}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        if not stream:
            status, found = self.post(path, body)
            assert status == 200, found
            choice = found["choices"][0]
            text = choice["message"]["content"] if chat else choice["text"]
            return {"tokens": choice["token_ids"], "text": text, "usage": found["usage"], "model": found["model"]}
        answer: dict[str, Any] = {"tokens": [], "text": ""}
        for event in self.events(path, body):
            for choice in event["choices"]:
                answer["tokens"] += choice.get("token_ids") or []
                answer["text"] += (choice["delta"].get("content") or "") if chat else choice["text"]
            answer |= {"usage": event.get("usage"), "model": event["model"]}
        return answer
