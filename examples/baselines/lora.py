"""LoRA, as implemented by PEFT: a low-rank update of every linear layer of the base.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from .common import Baseline


class Lora(Baseline):
    """`W + (alpha / r) B A` in all linear layers except the head; A and B are trained (section 4.1).

    Args:
        base: Folder of the base.
        rank: r; alpha is 2 r.
        **settings: Arguments of [`Baseline`].
    """

    default_learning_rate = 3e-3

    def __init__(self, base: str | Path, rank: int = 4, **settings: Any) -> None:
        self.rank = rank
        super().__init__(base, **settings)

    def attach(self, base: PreTrainedModel) -> PeftModel:
        """Add B A to the linear layers. B is initialized to zero, so the model initially equals the base."""
        config = LoraConfig(
            task_type="CAUSAL_LM", r=self.rank, lora_alpha=2 * self.rank, target_modules="all-linear", lora_dropout=0.0
        )
        return get_peft_model(base, config).eval()
