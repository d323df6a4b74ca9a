"""Coconut: the base is fine-tuned to reason in its own hidden states before it answers.

Hao et al. 2024, "Training Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769, section 3.

    z_1 = LM(prompt).hidden[-1],   z_k+1 = LM(prompt, z_1 ... z_k).hidden[-1]
    loss = NLL(response | prompt, z_1 ... z_N)          trained: all weights, through all N steps

The number of latent steps is fixed, so the paper's tokens around them are omitted. The paper's curriculum replaces
written steps by latent ones, one after another. Here every stage keeps the whole response, because all systems are
scored on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Cache, DynamicCache, PreTrainedModel

from .common import Baseline, Batch, Example, pad


class LatentReasoner(nn.Module):
    """A language model with N latent steps between prompt and response.

    Args:
        base: A decoder LM whose hidden states have the same width as its input embeddings.
        steps: N, at least 1.
    """

    def __init__(self, base: PreTrainedModel, steps: int) -> None:
        super().__init__()
        self.base = base
        self.steps = steps

    def think(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Cache]:
        """Return the latents `(B, N, H)` of left-padded prompts `(B, L)`, and a cache of all but the last."""
        cache = DynamicCache(config=self.base.config)
        embeddings = self.base.get_input_embeddings()(ids)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        latents: list[Tensor] = []
        for _ in range(self.steps):
            # Positional arguments, because transformers releases name the cache argument differently.
            output = self.base(
                None, mask, positions, cache, embeddings, use_cache=True, output_hidden_states=True, logits_to_keep=1
            )
            embeddings = output.hidden_states[-1][:, -1:]  # (B, 1, H)
            latents.append(embeddings)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            positions = positions[:, -1:] + 1
        return torch.cat(latents, 1), cache

    def forward(self, prompt: Tensor, prompt_mask: Tensor, response: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the mean loss of the response, and its logits.

        Args:
            prompt: Left-padded ids, `(B, L)`.
            prompt_mask: `(B, L)`.
            response: Right-padded ids, `(B, M)`.
            labels: `(B, M)`, the response with -100 at its padding.
        """
        latents, cache = self.think(prompt, prompt_mask)
        written = self.base.get_input_embeddings()(response[:, :-1])
        thought = prompt_mask.new_ones(len(prompt), self.steps)
        start = prompt_mask.sum(1, keepdim=True) + self.steps - 1  # position of the last latent
        logits = self.base(
            None,
            torch.cat([prompt_mask, thought, (labels[:, :-1] != -100).long()], 1),
            start + torch.arange(response.shape[1], device=start.device),
            cache,
            torch.cat([latents[:, -1:], written], 1),
            use_cache=True,
        ).logits  # (B, M, V): row j predicts the response's token j
        return {"loss": cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), "logits": logits}

    def generate(self, ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        """Generate new ids `(B, M)` for left-padded prompts `(B, L)`."""
        latents, _ = self.think(ids, mask)
        return self.base.generate(
            inputs_embeds=torch.cat([self.base.get_input_embeddings()(ids), latents], 1),
            attention_mask=torch.cat([mask, mask.new_ones(latents.shape[:2])], 1),
            **settings,
        )


class Coconut(Baseline):
    """The whole base is trained to use N latent steps.

    Args:
        base: Folder of the base.
        stages: Latent steps of each training stage, such as `(2, 4, 8)`. Each stage has an equal share of the training
            steps and its own optimizer, as in the paper. Generation uses the last number.
        **settings: Arguments of [`Baseline`].

    Raises:
        ValueError: If there is no stage, or a stage without latent steps.
    """

    default_learning_rate = 1e-3

    def __init__(self, base: str | Path, stages: Sequence[int] = (8,), **settings: Any) -> None:
        if not stages or min(stages) < 1:
            raise ValueError(f"`stages` must hold numbers of latent steps, each at least 1, got {tuple(stages)}.")
        self.stages = tuple(stages)
        super().__init__(base, **settings)

    def attach(self, base: PreTrainedModel) -> LatentReasoner:
        """Return the base with all weights trainable."""
        return LatentReasoner(base.requires_grad_(True), self.stages[-1]).eval()

    def train(self, examples: Sequence[Example], steps: int, seed: int) -> None:
        """Train the stages in order, each on its own share of the examples."""
        count = len(self.stages)
        bounds = [(steps * i // count, steps * (i + 1) // count) for i in range(count)]
        for latent_steps, (first, last) in zip(self.stages, bounds, strict=True):
            share = examples[len(examples) * first // steps : len(examples) * last // steps]
            if share and last > first:
                self.model.steps = latent_steps
                super().train(share, last - first, seed)
        self.model.steps = self.stages[-1]

    def collate(self, rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
        """Left-pad the prompts and right-pad the responses."""
        prompt, mask = self.left_padded([prompt for prompt, _ in rows])
        responses = [response for _, response in rows]
        return {
            "prompt": prompt,
            "prompt_mask": mask,
            "response": pad(responses, self.tokenizer.pad_token_id),
            "labels": pad(responses, -100),
        }

    def generate(self, ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        """Generate new ids `(B, M)`."""
        return self.model.generate(ids, mask, **settings)
