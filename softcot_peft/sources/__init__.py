"""Thought sources: modules that turn prompts into soft thoughts. Each kind is registered by name."""

from .assistant import AssistantSource
from .base_model import BaseSource
from .inputs import BaseLM, Prompts
from .linear_maps import LinearProjection, MLPProjection, PerPositionProjection
from .projections import register_projection
from .source import ThoughtSource, make_source, register_source

__all__ = [
    "AssistantSource",
    "BaseLM",
    "BaseSource",
    "LinearProjection",
    "MLPProjection",
    "PerPositionProjection",
    "Prompts",
    "ThoughtSource",
    "make_source",
    "register_projection",
    "register_source",
]
