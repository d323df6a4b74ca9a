"""Zero-shot: the base answers alone. The wording of a zero-shot CoT prompt belongs to the task, not to the system.

Kojima et al. 2022, "Large Language Models are Zero-Shot Reasoners", arXiv 2205.11916.
"""

from __future__ import annotations

from .common import Baseline


class ZeroShot(Baseline):
    """The unchanged base: nothing is attached, trained or added to the prompt."""
