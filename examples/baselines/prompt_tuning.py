"""Prompt tuning, as implemented by PEFT: trained vectors before the prompt.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig, PromptTuningInit, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from .common import Baseline


class PromptTuning(Baseline):
    """N trained vectors before every prompt, initialized from the embeddings of random tokens.

    Args:
        base: Folder of the base.
        num_virtual_tokens: N.
        **settings: Arguments of [`Baseline`].
    """

    default_learning_rate = 3e-2

    def __init__(self, base: str | Path, num_virtual_tokens: int = 8, **settings: Any) -> None:
        self.num_virtual_tokens = num_virtual_tokens
        super().__init__(base, **settings)

    def attach(self, base: PreTrainedModel) -> PeftModel:
        """Return the base with new vectors."""
        config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.num_virtual_tokens,
            prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
        )
        return get_peft_model(base, config).eval()

    def generate(self, ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        """Generate new ids `(B, M)`. Position ids count attended tokens, so padding after the vectors takes none.

        PEFT's own `generate` drops position ids, so rows of a padded batch would differ from the same rows alone.
        """
        base, number = self.model.get_base_model(), self.num_virtual_tokens
        vectors = self.model.get_prompt(batch_size=len(ids))  # (B, N, H)
        return base.generate(
            inputs_embeds=torch.cat([vectors, base.get_input_embeddings()(ids)], 1),
            attention_mask=torch.cat([mask.new_ones(len(ids), number), mask], 1),
            **settings,
        )
