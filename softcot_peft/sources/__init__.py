"""Thought sources: what reads a prompt and yields soft thoughts. One module per kind; others can be registered."""

from .assistant import AssistantSource
from .projections import LinearProjection, register_projection
from .source import BaseLM, Prompts, ThoughtSource, make_source, register_source

__all__ = [
    "AssistantSource",
    "BaseLM",
    "LinearProjection",
    "Prompts",
    "ThoughtSource",
    "make_source",
    "register_projection",
    "register_source",
]
