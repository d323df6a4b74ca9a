"""Precomputed thoughts: the source's states for each prompt of a data set, looked up by the prompt's token ids."""

from .compute import ComputeThoughts, compute_thoughts
from .use import use_thoughts

__all__ = ["ComputeThoughts", "compute_thoughts", "use_thoughts"]
