"""Thoughts of a data set, computed once: what the source says of each prompt is kept and found by the prompt's ids."""

from .compute import ComputeThoughts, compute_thoughts
from .use import use_thoughts

__all__ = ["ComputeThoughts", "compute_thoughts", "use_thoughts"]
