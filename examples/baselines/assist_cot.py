"""Assist-CoT: the assistant writes its hint as text, and the base reads it behind the prompt.

A baseline of the SoftCoT paper (Xu et al. 2025, arXiv 2502.12134): hard tokens instead of soft thoughts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .common import Baseline


def append(prompt: str, hint: str) -> str:
    """The hint right behind the prompt."""
    return prompt + hint


class AssistCoT(Baseline):
    """The base reads the prompt and what the assistant wrote, greedily, after the same prompt. Nothing is trained.

    Args:
        base: Folder of the base.
        assistant: Folder of the assistant and its tokenizer.
        put: Prompt and hint to the base's prompt.
        max_hint_tokens: Most tokens of a hint.
        **settings: As [`Baseline`] takes them.
    """

    def __init__(
        self,
        base: str | Path,
        assistant: str | Path,
        put: Callable[[str, str], str] = append,
        max_hint_tokens: int = 16,
        **settings: Any,
    ) -> None:
        super().__init__(base, **settings)
        self.assistant = Baseline(assistant, max_new_tokens=max_hint_tokens)
        self.put = put

    def hints(self, prompts: Sequence[str]) -> list[str]:
        """What the assistant writes. Its tokens count as the system's."""
        before = self.assistant.generated_tokens
        hints = self.assistant.answer(prompts)
        self.generated_tokens += self.assistant.generated_tokens - before
        return hints

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Prompts with their hints."""
        hints = self.hints(prompts)
        return super().prompt_ids([self.put(prompt, hint) for prompt, hint in zip(prompts, hints, strict=True)])
