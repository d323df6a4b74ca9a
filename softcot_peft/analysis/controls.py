"""Controls: what the base reads in place of the soft thoughts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .active import Model, disabled_adapters, source_of

# Controls of `with_thoughts` and their labels in tables.
CONTROLS = {
    "own": "soft thoughts",
    "none": "no thoughts",
    "zero": "zero vectors",
    "other_question": "another question's",
    "random_projection": "random projection",
    "mean": "average",
}


@contextmanager
def with_thoughts(model: Model, control: str, mean: Tensor | None = None, seed: int = 0) -> Iterator[None]:
    """Replace the soft thoughts of a model within the block. Prompts and thought positions do not change.

    Example:
        ```python
        from softcot_peft.analysis import CONTROLS, mean_thoughts, with_thoughts

        mean = mean_thoughts(model, tokenizer, prompts)
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        for control, label in CONTROLS.items():
            with with_thoughts(model, control, mean):
                output = model.generate(**batch, max_new_tokens=8)
            print(label, tokenizer.batch_decode(output))
        ```

    Args:
        model: A model with an active SoftCoT adapter; for `"own"` and `"none"`, any adapter.
        control: What the base reads in place of the thoughts, a key of `CONTROLS`. `"own"`: the thoughts themselves.
            `"none"`: no thoughts; adapters are disabled. `"zero"`: zero vectors. `"other_question"`: the thoughts of
            the previous row; every batch needs at least two rows, with different questions. `"random_projection"`:
            the source's hidden states, projected by a randomly initialized linear layer. `"mean"`: the same vectors
            for every question.
        mean: The vectors for the control `"mean"`, `(N, H_base)`. See [`mean_thoughts`].
        seed: Random seed for the control `"random_projection"`.

    Raises:
        TypeError: `model` is not a model.
        ValueError: The control is unknown; `mean` is missing or its shape differs from that of the thoughts;
            `"other_question"` gets a batch of one row; or the model has no active SoftCoT adapter.
    """
    if control not in CONTROLS:
        raise ValueError(f"`control` must be one of {tuple(CONTROLS)}, got {control!r}.")
    if control == "mean" and mean is None:
        raise ValueError("`mean` must be given for the control 'mean', got None. Compute it with `mean_thoughts`.")
    if control == "own":
        yield
    elif control == "none":
        with disabled_adapters(model):
            yield
    else:
        handle = source_of(model).register_forward_hook(_replacement(control, mean, seed))
        try:
            yield
        finally:
            handle.remove()


def _replacement(
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
