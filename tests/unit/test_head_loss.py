"""The loss in pieces: the value and gradient of the whole, from few logits at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import head_loss
from torch import Tensor, nn

T, H, V = 11, 6, 17


def make(dtype: torch.dtype = torch.float32, tokens: int = T) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(H, V, dtype=dtype).requires_grad_(False)
    return head, torch.randn(tokens, H, dtype=dtype).requires_grad_(), torch.randint(V, (tokens,))


def whole(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


@pytest.mark.parametrize("at_once", [1, 3 * V, 3 * V + 1, T * V, 10**6])
def test_value_and_gradient_are_those_of_the_whole(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "_LOGITS_ON_CPU", at_once)
    head, hidden, targets = make()
    expected = whole(head, hidden, targets)
    (slope,) = torch.autograd.grad(expected / 3, hidden)
    read: list[int] = []
    head.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    found = head_loss.cross_entropy(head, hidden, targets, V)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found / 3, hidden)[0], slope, atol=1e-6, rtol=1e-6)
    assert sum(read) == T
    assert max(read) == max(1, min(T, at_once // V))


def test_heads_in_bfloat16_have_a_loss_in_float32() -> None:
    head, hidden, targets = make(torch.bfloat16)
    found = head_loss.cross_entropy(head, hidden, targets, V)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole(head, hidden, targets), atol=1e-5, rtol=1e-5)
    found.backward()
    slope, hidden.grad = hidden.grad, None
    whole(head, hidden, targets).backward()
    torch.testing.assert_close(slope, hidden.grad, atol=2e-2, rtol=2e-2)


def test_nothing_is_computed_for_gradients_that_nobody_wants() -> None:
    head, hidden, targets = make()

    class Noting(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            assert not rows.requires_grad
            return head(rows)

    with torch.no_grad():
        found = head_loss.cross_entropy(Noting(), hidden, targets, V)
    torch.testing.assert_close(found, whole(head, hidden, targets).detach())
    assert not head_loss.cross_entropy(Noting(), hidden.detach(), targets, V).requires_grad


def test_no_tokens_have_no_loss_and_no_gradient() -> None:
    head, hidden, targets = make(tokens=0)
    found = head_loss.cross_entropy(head, hidden, targets, V)
    assert found == 0
    assert torch.autograd.grad(found, hidden)[0].shape == (0, H)


def test_it_is_differentiable_once() -> None:
    head, hidden, targets = make()
    found = head_loss.cross_entropy(head, hidden, targets, V)
    (slope,) = torch.autograd.grad(found**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_a_head_that_was_not_called_has_no_loss() -> None:
    head, _, targets = make()
    stand_in: Any = head_loss.HeadLoss(head, torch.arange(T), targets, None, V)
    with pytest.raises(RuntimeError, match="must call its head"):
        stand_in.loss  # noqa: B018
