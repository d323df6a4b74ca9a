"""Measures a pretrained pair's training steps on rows of a data set, and where their time goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from . import pretrained, rivals
from .memory import peak
from .models import Batch
from .timing import multiplications, profiled

if TYPE_CHECKING:
    from .sections import Bench

ATTENTION, LOSS = "attention", "loss"
PROFILED = {ATTENTION: "aten::_scaled_dot_product", LOSS: "_ChunkedLoss"}  # names of operations
# Relative to a loss and to a gradient's norm. In float32 all methods agree within 1e-5 on the same rows; in bfloat16
# their losses are up to 1 % and their gradients up to 12 % apart, on either side of those in float32.
LOSS_ROUNDING, GRADIENT_ROUNDING = 0.02, 0.25


def rows(bench: Bench) -> dict[str, Any]:
    """Measure a pretrained pair's step on rows of a data set in two passes and in one, and where its time goes.

    The time of an order is that of its batch with the median number of columns; its padding is that of all batches.
    """
    num, ordered = bench.size.case.thoughts, pretrained.batches(bench.rows, bench.size.case.batch)
    return {
        "rows": len(bench.rows),
        "padding": {order: pretrained.padding(batches, num) for order, batches in ordered.items()},
        "cases": [
            _rows_in_order(bench, order, pretrained.typical(ordered[order]))
            for order in (pretrained.ALIKE, pretrained.RANDOM)
        ],
    }


def _rows_in_order(bench: Bench, order: str, chosen: Sequence[pretrained.Row]) -> dict[str, Any]:
    """Measure the steps on one batch, after each has run once and all have agreed in loss and gradient."""
    pair, device, num = bench.pair, bench.pair.device, bench.size.case.thoughts
    prompts, responses = map(list, zip(*chosen, strict=True))
    batch = Batch(prompts, responses, num, device, pair.reading)
    ways = rivals.ways(pair, batch, (rivals.SOFTCOT, rivals.PLAIN_PATH, rivals.FLOOR))
    steps: dict[str, Callable[[], Any]] = {name: rivals.backward(*way) for name, way in ways.items()}
    steps[rivals.SOFTCOT]()  # the package tries its two passes once
    memory, counted = dict[str, int](), dict[str, int]()

    def count(name: str, step: rivals.Step) -> torch.Tensor:
        losses: list[torch.Tensor] = []
        run = partial(multiplications, lambda: losses.append(step()))
        memory[name] = peak(lambda: counted.update({name: run()}), device)
        return losses[0]

    agreed = agreement(ways, count)
    parts: list[dict[str, float]] = []
    floor = ways[rivals.FLOOR][0]
    again = {rivals.AGAIN: lambda: parts.append(rivals.floor_parts(pair, floor, batch))}
    predicted, head = sum(map(len, responses)), pair.base.get_output_embeddings().weight.numel()
    text = (
        f"{len(chosen)} {order}, prompts up to {max(map(len, prompts))}, N = {num}, responses up to "
        f"{max(map(len, responses))}"
    )
    return {
        "order": order,
        "text": text,
        "agreement": agreed,
        "seconds": bench.time(steps | again, text, warmup=0),
        "peak_bytes": memory,
        "multiplications": counted,
        "loss_multiplications": 2 * predicted * head,  # logits, and the gradient of the hidden states
        "parts": {name: [part[name] for part in parts] for name in parts[0]},
        "profile": profiled(steps[rivals.SOFTCOT], PROFILED, device),
        "padding": pretrained.padding([chosen], num),
    }


def agreement(
    ways: Mapping[str, rivals.Way], run: Callable[[str, rivals.Step], torch.Tensor] = lambda name, step: step()
) -> dict[str, dict[str, float]]:
    """Run each step once, and return its loss and how far its gradient is from the first one's.

    Args:
        ways: What each method trains, and its loss.
        run: Runs a step, given its name, and returns its loss.

    Returns:
        For "loss" and "gradient", a number for each method: the loss, and the norm of the difference of the gradients
        relative to that of the first.

    Raises:
        RuntimeError: A loss or a gradient differs from the first by more than rounding.
    """
    losses, gradients = {}, {}
    for name, (module, loss) in ways.items():
        losses[name] = run(name, rivals.backward(module, loss)).item()
        trained = [weight.grad for weight in module.parameters() if weight.requires_grad]
        gradients[name] = torch.cat([gradient.flatten().float() for gradient in trained])
    wanted, first = next(iter(losses.values())), next(iter(gradients.values()))
    apart = {name: float((found - first).norm() / first.norm()) for name, found in gradients.items()}
    close = all(abs(loss - wanted) <= LOSS_ROUNDING * wanted for loss in losses.values())
    if not (close and all(value <= GRADIENT_ROUNDING for value in apart.values())):
        raise RuntimeError(f"All methods must have one loss and one gradient, got losses {losses}, and {apart} apart.")
    return {"loss": losses, "gradient": apart}


def profile_shares(case: Mapping[str, Any]) -> dict[str, float]:
    """Return the share of attention and of the loss in a profiled step."""
    profile = case["profile"]
    return {name: profile[name] / profile["whole"] for name in (LOSS, *sorted(profile.keys() - {LOSS, "whole"}))}


def speeds(case: Mapping[str, Any]) -> tuple[float, float]:
    """Return the GFLOP/s of the loss, and of the rest of a profiled step without attention."""
    profile, loss = case["profile"], case["loss_multiplications"]
    attention = sum(time for name, time in profile.items() if name.startswith(ATTENTION))
    rest = profile["whole"] - profile[LOSS] - attention
    return 2e-9 * loss / profile[LOSS], 2e-9 * (case["multiplications"][rivals.SOFTCOT] - loss) / rest
