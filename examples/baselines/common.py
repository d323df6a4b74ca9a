"""Training and generation shared by all systems, so that only the method differs.

Independent of any method. Rows are right-padded in training and left-padded in generation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

Example = dict[str, str]  # with `prompt` and `response`
Batch = dict[str, Tensor]


class System(Protocol):
    """Interface of the compared systems."""

    generated_tokens: int

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters."""

    def fit(self, examples: Sequence[Example], steps: int, seed: int) -> None:
        """Train from the original base."""

    def answer(self, prompts: Sequence[str], **generation: Any) -> list[str]:
        """Return the generated text for each prompt."""


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Pad rows of ids to a tensor `(B, L)`."""
    return pad_sequence([torch.tensor(row) for row in rows], True, value, side)


class Baseline:
    """The plain base. Other systems override what is attached to it and what it reads.

    Args:
        base: Folder of the base and its tokenizer.
        learning_rate: Peak rate of `fit`; it decays linearly to zero. `None`: the system's default.
        batch_size: Examples per training step.
        max_new_tokens: Maximum number of tokens of an answer.
    """

    default_learning_rate = 0.0

    def __init__(
        self, base: str | Path, *, learning_rate: float | None = None, batch_size: int = 16, max_new_tokens: int = 32
    ) -> None:
        self.base = base
        self.learning_rate = self.default_learning_rate if learning_rate is None else learning_rate
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.generated_tokens = 0
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
        self.model: Any = self.attach(self.load_base())

    def load_base(self) -> PreTrainedModel:
        """Load the base again, frozen."""
        return AutoModelForCausalLM.from_pretrained(self.base).eval().requires_grad_(False)

    def attach(self, base: PreTrainedModel) -> nn.Module:
        """Return the model to train and evaluate: the base with what the method adds."""
        return base

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the ids that the base reads for each prompt."""
        return [list(ids) for ids in self.tokenizer(list(prompts))["input_ids"]]

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)

    def fit(self, examples: Sequence[Example], steps: int, seed: int) -> None:
        """Train from the original base; a system without trained parameters is unchanged.

        Args:
            examples: Prompts and responses; `steps * batch_size` of them make one epoch.
            steps: Optimizer steps.
            seed: Seed of the initial weights and the order of the examples.
        """
        if not self.trained_parameters:
            return
        set_seed(seed)
        self.model = self.attach(self.load_base())
        self.train(examples, steps, seed)

    def train(self, examples: Sequence[Example], steps: int, seed: int) -> None:
        """Train the attached model with the plain `Trainer`."""
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                lr_scheduler_type="linear",
                weight_decay=0.0,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=seed,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                use_cpu=not torch.cuda.is_available(),
            )
            trainer = Trainer(self.model, arguments, self.collate, train_dataset=self.rows(examples))
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        self.model.eval()

    def rows(self, examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
        """Return the ids of each prompt and of its response with EOS."""
        prompts = self.prompt_ids([example["prompt"] for example in examples])
        responses = self.tokenizer([example["response"] for example in examples], add_special_tokens=False)
        eos = self.tokenizer.eos_token_id
        return [(prompt, [*ids, eos]) for prompt, ids in zip(prompts, responses["input_ids"], strict=True)]

    def collate(self, rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
        """Join prompts and responses, with labels on the responses: ids, mask and labels, each `(B, L)`."""
        ids = [[*prompt, *response] for prompt, response in rows]
        return {
            "input_ids": pad(ids, self.tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(row) for row in ids], 0),
            "labels": pad([[-100] * len(prompt) + response for prompt, response in rows], -100),
        }

    @torch.no_grad()
    def loss(self, examples: Sequence[Example]) -> float:
        """Return the mean negative log-likelihood per response token, in nats, averaged over batches of 100."""
        rows = self.rows(examples)
        device = next(self.model.parameters()).device
        batches = [self.collate(rows[start : start + 100]) for start in range(0, len(rows), 100)]
        losses = [self.model(**{name: value.to(device) for name, value in batch.items()})["loss"] for batch in batches]
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def answer(self, prompts: Sequence[str], **generation: Any) -> list[str]:
        """Return the generated text for each prompt, in batches of 100, greedy by default.

        Args:
            prompts: Questions.
            **generation: Arguments of `generate`, such as `do_sample=True`. Several answers to a prompt are adjacent.
        """
        settings = {"max_new_tokens": self.max_new_tokens, "do_sample": False, **generation}
        answers: list[str] = []
        for start in range(0, len(prompts), 100):
            rows = self.prompt_ids(prompts[start : start + 100])
            ids, mask = self.left_padded(rows)
            device = next(self.model.parameters()).device
            ids, mask = ids.to(device), mask.to(device)
            new = self.generate(ids, mask, **settings)
            self.generated_tokens += self.count(new)
            answers += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    def left_padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return left-padded ids and mask, each `(B, L)`."""
        return pad(rows, self.tokenizer.pad_token_id, "left"), pad([[1] * len(row) for row in rows], 0, "left")

    def generate(self, ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        """Generate new ids `(B, M)` for left-padded prompts `(B, L)`."""
        return self.model.generate(input_ids=ids, attention_mask=mask, **settings)[:, ids.shape[1] :]

    def count(self, new: Tensor) -> int:
        """Count the generated tokens, including each row's EOS but not its padding."""
        ends = (new == self.tokenizer.eos_token_id).long()
        return int((ends.cumsum(1) - ends == 0).sum())
