"""Computes the loss of a causal LM in chunks, so that the logits of all tokens are never in memory at once.

The head is frozen, so the backward pass only needs the gradient of the hidden states. It is computed together with the
loss: the logits of a chunk are freed before those of the next chunk are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Logits per chunk. On a CPU, small chunks fit its caches and reuse memory; accelerators need large matrix products.
_LOGITS_ON_CPU, _LOGITS = 2**23, 2**26

Head = Callable[[Tensor], Tensor]


def cross_entropy(head: Head, hidden: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Sum `-log softmax(head(hidden))[target]` over tokens, in float32.

    Args:
        head: Maps `(1, T, H)` to logits `(1, T, V)`; has no trained parameters.
        hidden: `(T, H)`.
        targets: Ids, `(T,)` int64.
        vocabulary: V or an estimate of it; determines the chunk size.

    Returns:
        A float32 scalar, differentiable once with respect to `hidden`.
    """
    max_logits = _LOGITS_ON_CPU if hidden.device.type == "cpu" else _LOGITS
    needs_grad = hidden.requires_grad and torch.is_grad_enabled()
    total: Tensor = _ChunkedLoss.apply(hidden, targets, head, max(1, max_logits // vocabulary), needs_grad)
    return total


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, rows: int, needs_grad: bool) -> Tensor:
        total, gradients = hidden.new_zeros((), dtype=torch.float32), []
        for chunk, ids in zip(hidden.split(rows), targets.split(rows), strict=True):
            with torch.set_grad_enabled(needs_grad):
                chunk = chunk.detach()[None].requires_grad_(needs_grad)
                logits = head(chunk)  # (1, T', V)
            ids = ids[None, :, None].to(logits.device)
            log_probs = logits.detach().float().log_softmax(-1)
            total -= log_probs.gather(-1, ids).sum().to(total.device)
            if needs_grad:
                grad_logits = log_probs.exp_().scatter_add_(-1, ids, torch.full_like(ids, -1, dtype=log_probs.dtype))
                gradients += torch.autograd.grad(logits, chunk, grad_logits.to(logits))
        if needs_grad:
            ctx.save_for_backward(torch.cat([gradient[0] for gradient in gradients]) if gradients else hidden)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient), None, None, None, None


class HeadLoss:
    """Replaces the head of a base in one training step: computes the loss directly from the hidden states.

    Args:
        head: The base's head.
        predicts: Indices into the hidden states `(B * W, H)` that predict a label, `(T,)` int64.
        targets: Those labels, `(T,)`.
        num_items: Divisor of the summed loss, such as `Trainer`'s number of labels in an accumulated batch; `None`: T.
        vocabulary: V or an estimate of it.
    """

    def __init__(
        self, head: nn.Module, predicts: Tensor, targets: Tensor, num_items: Tensor | int | None, vocabulary: int
    ) -> None:
        self._head = head
        self._predicts = predicts
        self._targets = targets
        self._num_items = num_items
        self._vocabulary = vocabulary
        self._called = False
        self._loss: Tensor | None = None

    def replace_head(self, hidden: Tensor) -> Tensor:
        """Compute the loss in place of the head.

        Args:
            hidden: The input of the head, `(B, W, H)`.

        Returns:
            The new input of the head: no tokens, `(B, 0, H)`, in the first call; `hidden` in later calls.
        """
        if self._called:  # the loss itself calls the head for each chunk
            return hidden
        self._called, device = True, hidden.device
        picked = hidden.flatten(0, 1).index_select(0, self._predicts.to(device))  # (T, H)
        total = cross_entropy(self._head, picked, self._targets.to(device), self._vocabulary)
        number = len(picked) if self._num_items is None else self._num_items
        self._loss = total / (number.to(device) if isinstance(number, Tensor) else number)
        return hidden[:, :0]

    @property
    def loss(self) -> Tensor:
        """The loss as computed by transformers' `ForCausalLMLoss`, a scalar.

        Raises:
            RuntimeError: The base has not called its head.
        """
        if self._loss is None:
            raise RuntimeError("The base must call its head in a training step, but did not. Report it.")
        return self._loss
