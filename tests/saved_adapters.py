"""Adapters saved for the tests of routes and files, and what they must generate."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from batches import generated, up_to_eos
from oracle import Oracle
from peft import PeftModel
from safetensors.torch import load_file
from tiny_pair import QUESTIONS, Pair
from torch import Tensor, nn
from transformers import PreTrainedModel

from softcot_peft import with_thought_tokens

NEW = 8  # tokens generated per prompt
N = 4  # thoughts
EOS, PAD = 1, 0
PROMPTS = [QUESTIONS[1], QUESTIONS[0], "Seven?"]  # of different lengths
CHATS = [
    [{"role": "user", "content": PROMPTS[0]}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": PROMPTS[1]},
        {"role": "assistant", "content": "Twelve."},
        {"role": "user", "content": "And with one more?"},
    ],
    [{"role": "user", "content": PROMPTS[2]}],
]


@dataclass
class Saved:
    """A saved adapter, and what the oracle says it generates."""

    folder: Path
    model: PeftModel
    oracle: Oracle
    plain: list[list[int]]  # new tokens for PROMPTS


@dataclass
class SavedChat:
    """A saved adapter trained with the run in the prompt, its tokenizer beside it."""

    folder: Path
    expected: list[list[int]]  # new tokens for CHATS
    prompts: list[list[int]]  # ids of CHATS, the run included


def save(pair: Pair, folder: Path) -> Saved:
    """Save an adapter with automatic placement."""
    model = pair.model()
    model.save_pretrained(folder)
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    plain = [oracle.generate(row, NEW) for row in pair.rows(PROMPTS)]
    for row, expected in zip(pair.rows(PROMPTS), plain, strict=True):
        assert base_tokens(oracle.base, row) != expected  # thoughts change every answer, so a lost adapter is seen
    return Saved(folder, model, oracle, plain)


def save_chat(pair: Pair, folder: Path) -> SavedChat:
    """Save an adapter that finds the run in the prompt."""
    model = pair.model(thought_token="<thought>", placement="thought_token")
    model.save_pretrained(folder)
    with_thought_tokens(pair.tokenizer, model.peft_config["default"]).save_pretrained(folder)
    oracle = Oracle.of(model, pair.base, pair.assistant, N)
    # The base's template by hand, with the run at the end of the last user turn.
    last_turns = [PROMPTS[0], "And with one more?", PROMPTS[2]]
    openings = [
        "<|user|>",
        f"<|system|>Be brief.<|end|><|user|>{PROMPTS[1]}<|end|><|assistant|>Twelve.<|end|><|user|>",
        "<|user|>",
    ]
    before = pair.rows([opening + turn for opening, turn in zip(openings, last_turns, strict=True)])
    [after, [run]] = pair.rows(["<|end|><|assistant|>", "<thought>"])
    expected = [oracle.generate(row, NEW, after) for row in before]
    assert all(base_tokens(oracle.base, row + after) != new for row, new in zip(before, expected, strict=True))
    return SavedChat(folder, expected, [row + [run] * N + after for row in before])


def base_tokens(base: PreTrainedModel, row: list[int]) -> list[int]:
    """What the plain base generates."""
    output = base.generate(torch.tensor([row]), max_new_tokens=NEW, do_sample=False)
    return up_to_eos(output[:, len(row) :].tolist())[0]


def written(model: nn.Module, inputs: dict[str, Tensor]) -> list[list[int]]:
    """Greedy new tokens of a batch."""
    return generated(model, inputs, NEW, do_sample=False)


def projection_in(folder: Path) -> dict[str, Tensor]:
    """The saved tensors under the names of the layer."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {re.sub(r".*embed_tokens\.", "", name): tensor for name, tensor in tensors.items()}


def check_projection_alone(folder: Path) -> None:
    """The weights file holds the two tensors of the projection, and no bytes for anything else."""
    file = folder / "adapter_model.safetensors"
    tensors = projection_in(folder)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "softcot_projection.weight": (32, 24),
        "softcot_projection.bias": (32,),
    }
    assert file.stat().st_size <= sum(tensor.nbytes for tensor in tensors.values()) + 4096
