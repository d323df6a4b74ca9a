"""The loss of a causal LM in pieces, so that the logits of all tokens are never there at once.

The head is frozen, so the gradient of the hidden states is all that a loss is needed for, and it is known as soon as
the loss is: the logits of a piece are gone before those of the next are made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Logits at once. On a CPU they stay in its cache and in memory that the process has; accelerators want large products.
_LOGITS_ON_CPU, _LOGITS = 2**23, 2**26

Head = Callable[[Tensor], Tensor]


def cross_entropy(head: Head, hidden: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Sum of `-log softmax(head(hidden))[target]` over tokens, in float32.

    Args:
        head: From `(1, T, H)` to logits `(1, T, V)`; nothing in it is trained.
        hidden: `(T, H)`.
        targets: Ids, `(T,)` int64.
        vocabulary: V, as far as it is known beforehand; it decides how large the pieces are.

    Returns:
        A scalar, float32; differentiable once, with respect to `hidden`.
    """
    most = _LOGITS_ON_CPU if hidden.device.type == "cpu" else _LOGITS
    wanted = hidden.requires_grad and torch.is_grad_enabled()
    total: Tensor = _InPieces.apply(hidden, targets, head, max(1, most // vocabulary), wanted)
    return total


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, rows: int, wanted: bool) -> Tensor:
        total, gradients = hidden.new_zeros((), dtype=torch.float32), []
        for piece, ids in zip(hidden.split(rows), targets.split(rows), strict=True):
            with torch.set_grad_enabled(wanted):
                piece = piece.detach()[None].requires_grad_(wanted)
                logits = head(piece)  # (1, T', V)
            ids = ids[None, :, None].to(logits.device)
            logs = logits.detach().float().log_softmax(-1)
            total -= logs.gather(-1, ids).sum().to(total.device)
            if wanted:
                slopes = logs.exp_().scatter_add_(-1, ids, torch.full_like(ids, -1, dtype=logs.dtype))
                gradients += torch.autograd.grad(logits, piece, slopes.to(logits))
        if wanted:
            ctx.save_for_backward(torch.cat([gradient[0] for gradient in gradients]) if gradients else hidden)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * slope.to(gradient), None, None, None, None


class HeadLoss:
    """Stands in for the head of a base in one training step: takes hidden states, and has the loss.

    Args:
        head: The base's own.
        predicts: Which of the hidden states, as `(B * W, H)`, predict a label, `(T,)` int64.
        targets: These labels, `(T,)`.
        num_items: What the sum is divided by, as `Trainer` counts the labels of an accumulated batch; `None`: T.
        vocabulary: V, as far as it is known beforehand.
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

    def stand_in(self, hidden: Tensor) -> Tensor:
        """Compute the loss in the place of the head, which is left nothing to do.

        Takes what the head is called with, `(B, W, H)`; returns what it is to read: `(B, 0, H)` the first time, later
        what it is given.
        """
        if self._called:  # also by the loss itself, piece by piece
            return hidden
        self._called, device = True, hidden.device
        picked = hidden.flatten(0, 1).index_select(0, self._predicts.to(device))  # (T, H)
        total = cross_entropy(self._head, picked, self._targets.to(device), self._vocabulary)
        number = len(picked) if self._num_items is None else self._num_items
        self._loss = total / (number.to(device) if isinstance(number, Tensor) else number)
        return hidden[:, :0]

    @property
    def loss(self) -> Tensor:
        """As transformers' `ForCausalLMLoss` computes it, a scalar.

        Raises:
            RuntimeError: The base has not called its head.
        """
        if self._loss is None:
            raise RuntimeError("The base must call its head in a training step, but did not. Report it.")
        return self._loss
