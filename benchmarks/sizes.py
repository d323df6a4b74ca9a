"""Sizes of models and batches, from seconds to an hour of run time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Case:
    """The shape of a training batch.

    Args:
        batch: Number of rows.
        prompt: Tokens of the longest prompt.
        thoughts: N.
        response: Tokens of the longest response.
        ragged: Whether rows differ in length, from half of the longest; otherwise all rows have the same length.
    """

    batch: int
    prompt: int
    thoughts: int
    response: int
    ragged: bool = False

    def __str__(self) -> str:
        rows = " of unequal length" if self.ragged else ""
        return f"{self.batch} rows{rows}, prompt {self.prompt}, N = {self.thoughts}, response {self.response}"


@dataclass(frozen=True)
class Size:
    """Models and batches of one run.

    Args:
        base: Fields of the base's Llama config, or the Hub id of a pretrained base.
        assistant: Fields of the assistant's Llama config, or the Hub id of a pretrained assistant.
        case: The training batch. Lengths are those of the rows if the models are pretrained.
        vocabulary: Vocabulary size of both models; of random models only, as `grow` and `processes`.
        grow: Numbers of thoughts, prompt lengths and batch sizes to measure, each varied alone.
        questions: Number of prompts of the evaluation.
        questions_at_once: Rows per batch of the evaluation.
        longest_answer: Maximum number of tokens of an answer.
        repeats: Rounds per measurement.
        processes: Number of new processes that time the import.
        dtype: Dtype of both models.
        cuda_only: Whether the size is too large for a CPU.
    """

    base: dict[str, Any] | str
    assistant: dict[str, Any] | str
    case: Case
    vocabulary: int = 0
    grow: dict[str, tuple[int, ...]] = field(default_factory=dict)
    questions: int = 64
    questions_at_once: int = 16
    longest_answer: int = 256
    repeats: int = 9
    processes: int = 15
    dtype: str = "float32"
    cuda_only: bool = False
    cases: tuple[Case, ...] = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        twice = replace(case, prompt=2 * case.prompt)
        object.__setattr__(self, "cases", (case, twice, replace(case, ragged=True)))

    @property
    def pretrained(self) -> bool:
        """Whether the models are pretrained, and read rows of a data set."""
        return isinstance(self.base, str)


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SIZES = {
    # a few seconds; only checks that everything runs
    "smoke": Size(
        base=_llama(32, 48, 2, 4, 2),
        assistant=_llama(24, 32, 2, 2, 1),
        vocabulary=96,
        case=Case(batch=2, prompt=12, thoughts=3, response=6),
        grow={"thoughts": (1, 3), "prompt": (6, 12), "batch": (1, 2)},
        questions=4,
        questions_at_once=2,
        longest_answer=4,
        repeats=2,
        processes=1,
    ),
    # a few minutes
    "small": Size(
        base=_llama(256, 704, 6, 4, 2),
        assistant=_llama(128, 352, 4, 2, 2),
        vocabulary=8192,
        case=Case(batch=4, prompt=220, thoughts=32, response=150),
        grow={"thoughts": (4, 16, 32), "prompt": (110, 220, 440), "batch": (1, 2, 4)},
        longest_answer=64,
        repeats=7,
        processes=9,
    ),
    # 56 M and 21 M parameters with GPT-2's vocabulary; one hour
    "issue": Size(
        base=_llama(384, 1024, 11, 6, 3),
        assistant=_llama(192, 512, 5, 3, 3),
        vocabulary=50257,
        case=Case(batch=4, prompt=220, thoughts=32, response=150),
        grow={"thoughts": (1, 4, 8, 16, 32, 64), "prompt": (55, 110, 220, 440, 880), "batch": (1, 2, 4, 8)},
        repeats=11,
        processes=21,
    ),
    # the shapes of Llama-3.1-8B and Llama-3.2-1B
    "7b": Size(
        base=_llama(4096, 14336, 32, 32, 8),
        assistant={**_llama(2048, 8192, 16, 32, 8), "tie_word_embeddings": True},
        vocabulary=128256,
        case=Case(batch=4, prompt=220, thoughts=32, response=150),
        grow={"thoughts": (1, 4, 8, 16, 32, 64), "prompt": (55, 110, 220, 440, 880), "batch": (1, 2, 4, 8)},
        longest_answer=128,
        repeats=11,
        processes=21,
        dtype="bfloat16",
        cuda_only=True,
    ),
    # pretrained models with different tokenizers, and rows of GSM8K; 15 minutes
    "real": Size(
        base="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        assistant="HuggingFaceTB/SmolLM2-135M-Instruct",
        case=Case(batch=8, prompt=0, thoughts=32, response=0),
        questions=16,
        longest_answer=32,
        repeats=3,
        dtype="bfloat16",
    ),
}
