"""Replaces or disables soft thoughts for `analysis`; keeps its access to package internals in one module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attached import hooks_of
from .sources import ThoughtSource

Model: TypeAlias = PeftModel | PreTrainedModel


def source_of(model: Model) -> ThoughtSource:
    """Return the active adapter's source, whose `forward` maps states to soft thoughts `(B, K, N, H_base)`."""
    source = hooks_of(model).host.layer.active_source()
    if source is None:
        raise ValueError("`model` must have an active SoftCoT adapter, got disabled ones. Leave `disable_adapter()`.")
    return source


@contextmanager
def disabled_adapters(model: Model) -> Iterator[None]:
    """Disable adapters within the block, whether PEFT or transformers attached them."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def replacement(
    control: str, mean: Tensor | None, seed: int
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """Return a forward hook that replaces a source's soft thoughts, `(B, K, N, H_base)`."""

    def replace(module: nn.Module, args: tuple[Any, ...], thoughts: Tensor) -> Tensor:
        if control == "zero":
            return torch.zeros_like(thoughts)
        if control == "random_projection":
            return _project_randomly(args[0], thoughts, seed)
        if mean is not None and control == "mean":
            if mean.shape != thoughts.shape[-2:]:
                raise ValueError(
                    f"`mean` must have the shape (N, H_base) of the thoughts, {tuple(thoughts.shape[-2:])}, got "
                    f"{tuple(mean.shape)}. Compute it from prompts with as many thoughts."
                )
            return mean.to(thoughts).expand_as(thoughts)
        if len(thoughts) < 2:
            raise ValueError("The control 'other_question' needs batches of two rows or more, got one.")
        return thoughts.roll(1, dims=0)

    return replace


def _project_randomly(states: Tensor, thoughts: Tensor, seed: int) -> Tensor:
    """Project hidden states to the shape of `thoughts` with a linear layer in its default initialization."""
    generator, bound = torch.Generator().manual_seed(seed), states.shape[-1] ** -0.5
    weight = torch.empty(thoughts.shape[-1], states.shape[-1]).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(thoughts.shape[-1]).uniform_(-bound, bound, generator=generator)
    return nn.functional.linear(states.to(thoughts), weight.to(thoughts), bias.to(thoughts))
