"""Adds a source's auxiliary loss to what trainers compute their loss from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _WithGradient(torch.autograd.Function):
    """Returns log-probabilities unchanged; their backward pass also runs that of an auxiliary loss.

    The loss is weighted by the sum of the absolute gradients of the labels' log-probabilities. It is 1 if the
    trainer's loss is their negative mean, and follows any division or scaling of it.
    """

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, extra: Tensor, predicted: Tensor) -> Tensor:
        ctx.extra, ctx.predicted = extra.detach(), predicted
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        counted = grad_output.float().abs() * ctx.predicted.to(grad_output.device)
        return grad_output, counted.sum().to(ctx.extra), None


def add_auxiliary(output: Any, extra: Tensor, predicted: Tensor, num_items: Tensor | int | None) -> Any:
    """Add an auxiliary loss to the output of a training step.

    Args:
        output: A `ModelOutput` with `loss`, or a tuple that begins with it. Some trainers (TRL's) compute their loss
            from `log_probs` `(B, L - 1)` instead.
        extra: The auxiliary loss, a scalar.
        predicted: Which tokens predict a label, `(B, L - 1)` bool.
        num_items: Number of labels of a step that accumulates gradients, of which this batch adds its share; `None`:
            this batch's.
    """
    weighted = extra if num_items is None else extra * (predicted.sum() / num_items).to(extra)
    if isinstance(output, tuple):
        return (output[0] + weighted.to(output[0]), *output[1:])
    output["loss"] = output["loss"] + weighted.to(output["loss"])
    log_probs = output.get("log_probs")
    if isinstance(log_probs, Tensor) and log_probs.shape == predicted.shape:
        output["log_probs"] = _WithGradient.apply(log_probs, extra, predicted)
    return output
