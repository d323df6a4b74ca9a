"""Tests whether soft thoughts carry information: controls that replace them, statistics and plots that describe them.

A score with soft thoughts means little by itself. Zero vectors in their place may cost only a few points, and thoughts
may collapse to nearly the same vector for every question. Report each score together with its controls.

`model` is always the PEFT model, or the base that the adapter was injected into. Its active adapter is used.
"""

from .controls import CONTROLS, with_thoughts
from .measures import attention_to_thoughts, nearest_tokens, thought_norms, thought_similarity
from .plots import plot_attention, plot_nearest_tokens, plot_similarity
from .thoughts import collect_thoughts, mean_thoughts
from .votes import majority_vote

__all__ = [
    "CONTROLS",
    "attention_to_thoughts",
    "collect_thoughts",
    "majority_vote",
    "mean_thoughts",
    "nearest_tokens",
    "plot_attention",
    "plot_nearest_tokens",
    "plot_similarity",
    "thought_norms",
    "thought_similarity",
    "with_thoughts",
]
