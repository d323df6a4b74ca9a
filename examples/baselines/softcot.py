"""SoftCoT: projected hidden states of a frozen assistant are soft thoughts for a frozen base.

Xu et al. 2025, "SoftCoT: Soft Chain-of-Thought for Efficient Reasoning with LLMs", arXiv 2502.12134.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from softcot_peft import SoftCoTConfig

from .common import Baseline


class SoftCoT(Baseline):
    """N soft thoughts between prompt and response; the projection is trained.

    Args:
        base: Folder of the base.
        assistant: Folder of the assistant and its tokenizer; `None` for a thought source without one.
        num_thought_tokens: N.
        config: Other fields of [`SoftCoTConfig`].
        **settings: Arguments of [`Baseline`].
    """

    default_learning_rate = 2e-2

    def __init__(
        self,
        base: str | Path,
        assistant: str | Path | None,
        num_thought_tokens: int = 8,
        config: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.config = SoftCoTConfig(
            task_type="CAUSAL_LM",
            assistant_model_name_or_path=None if assistant is None else str(assistant),
            num_thought_tokens=num_thought_tokens,
            **(config or {}),
        )
        super().__init__(base, **settings)

    def attach(self, base: PreTrainedModel) -> PeftModel:
        """Return the base with a new projection. The assistant is loaded on first use."""
        return get_peft_model(base, self.config).eval()

    def generate(self, ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        """Generate new ids `(B, M)` for left-padded prompts `(B, L)`.

        Args:
            ids: The prompts.
            mask: Their attention mask.
            **settings: Options of `generate`. With several chains (SoftCoT++), the first one answers by default; with
                `chains=None`, all do, in adjacent rows.
        """
        return super().generate(ids, mask, **{"chains": 0, **settings})
