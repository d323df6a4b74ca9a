"""Peak memory without clocks or allocators: the bytes of all tensors alive at once, the same in every run."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from conftest import make_assistant, make_base, make_base_tokenizer
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from softcot_peft import SoftCoTConfig, use_assistant

LONGEST = 16384


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside of it that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def peak_bytes(run: Callable[..., Any], *args: Any) -> int:
    """The peak of the bytes alive while a function runs, over what there was before."""
    with PeakBytes() as counted:
        result = run(*args)
    del result
    return counted.peak


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
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -4:] = batch["input_ids"][:, -4:]
    return labels


RUNS: dict[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = {
    "forward": forward,
    "generate": generate,
    "all logits": all_logits,
    "train": train,
}
