"""What is run to find its peak memory: a tiny pair with positions for long prompts, and its base alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from batches import last_labels
from peft import PeftModel, get_peft_model
from tiny_pair import make_assistant, make_base, make_base_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from softcot_peft import SoftCoTConfig, use_assistant

LONGEST = 16384


def make_model(num_thoughts: int) -> PeftModel:
    """A tiny pair with positions for long prompts, that reads the same ids."""
    torch.manual_seed(0)
    tokenizer = make_base_tokenizer()
    assistant = make_assistant(len(tokenizer))
    config = SoftCoTConfig(
        task_type="CAUSAL_LM",
        assistant_model_name_or_path=use_assistant(assistant, tokenizer, name="long"),
        assistant_shares_tokenizer=True,
        num_thought_tokens=num_thoughts,
    )
    return get_peft_model(make_base_alone(), config).eval()


def make_base_alone(**changes: object) -> PreTrainedModel:
    """The base with positions for long prompts."""
    base = make_base(len(make_base_tokenizer()), **changes).eval()
    base.config.max_position_embeddings = LONGEST
    return base


def make_batch(batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(6, 256, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(**batch, logits_to_keep=1, use_cache=False)


@torch.no_grad()
def all_logits(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(**batch, labels=responses(batch), use_cache=False)


def generate(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model.generate(**batch, max_new_tokens=1)


def train(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model.train()(**batch, labels=responses(batch), use_cache=False).loss.backward()


def responses(batch: dict[str, Tensor]) -> Tensor:
    """Labels of the last four tokens of every row."""
    return last_labels(batch["input_ids"], 4)


RUNS: dict[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = {
    "forward": forward,
    "generate": generate,
    "all logits": all_logits,
    "train": train,
}
