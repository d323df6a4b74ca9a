"""A tensor that is made when it is read. Knows no models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class LateLogits(Tensor):
    """Logits `(B, L, V)` that are put together at their first use, and then kept.

    A loss that the base computes needs no row of them before the thoughts; whoever reads them finds them all. What
    wraps models handles every output, used or not: DDP asks for its `grad_fn`, which logits to come have not yet, and
    clones it; accelerate casts it. So copies of logits to come are made late, too: with the logits themselves, since
    what is changed in place afterwards must not reach them, and with the gradients that were recorded when the copy
    was asked for.
    """

    _make: Callable[[], Tensor] | None
    _whole: Tensor | None
    _copies: list[ref[LateLogits]]

    @classmethod
    def of(cls, like: Tensor, shape: tuple[int, ...], make: Callable[[], Tensor]) -> LateLogits:
        """Logits to come.

        Args:
            like: Of their dtype and on their device.
            shape: Theirs.
            make: Makes them.
        """
        # One number that seems to fill the shape: whoever should reach past `__torch_function__` does not read zeros.
        late = like.new_full((), float("nan")).expand(shape).as_subclass(cls)
        late._make, late._whole, late._copies = partial(_with_gradients, torch.is_grad_enabled(), make), None, []
        return late

    def whole(self) -> Tensor:
        """The logits as an ordinary tensor, with their gradients."""
        if self._whole is None and self._make is not None:
            make, self._make = self._make, None
            try:
                self._whole = make()
            except BaseException:
                self._make = make
                raise
            for copy in (found() for found in self._copies):
                if copy is not None and copy._make is not None:  # else the one that asks
                    copy.whole()
        if self._whole is None:
            raise RuntimeError("`LateLogits` must be made with `of`, got a copy of their placeholder.")
        return self._whole

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what shape, dtype and device tell; for all else, take the logits as they are."""
        if func in _ANSWERED:
            return super().__torch_function__(func, types, args, kwargs or {})
        if func in _COPIES and isinstance(args[0], LateLogits) and args[0]._whole is None:
            late, *rest = args
            like = func(torch.empty((), dtype=late.dtype, device=late.device), *rest, **kwargs or {})
            copy = cls.of(like, late.shape, lambda: func(late.whole(), *rest, **kwargs or {}))
            late._copies.append(ref(copy))
            return copy
        args, kwargs = tree_map(_as_whole, (args, kwargs or {}))
        return func(*args, **kwargs)


def _with_gradients(wanted: bool, make: Callable[[], Tensor]) -> Tensor:
    with torch.set_grad_enabled(wanted):
        return make()


def _as_whole(value: Any) -> Any:
    return LateLogits.whole(value) if isinstance(value, LateLogits) else value


_ANSWERED = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
    Tensor.grad_fn.__get__,  # type: ignore[union-attr]
}
_COPIES = {Tensor.float, Tensor.bfloat16, Tensor.half, Tensor.double, Tensor.to, Tensor.clone, Tensor.detach}
