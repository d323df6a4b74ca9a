"""Trains a system on rows in a fixed order, the same for all systems, and computes its loss on other rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from baselines import Baseline, SoftCoT
from torch import Tensor
from torch.nn.functional import cross_entropy

from softcot_peft import compute_thoughts, use_thoughts
from softcot_peft.analysis import CONTROLS, with_thoughts
from softcot_peft.analysis.active import source_of

from .jobs import Training
from .systems import batches

Rows = Sequence[tuple[list[int], list[int]]]  # ids of prompts and responses
MICRO = 8  # rows of one pass; more would need memory for their logits
MARGIN = 0.1  # nats per token, by which another question's thoughts should be worse
LOSSES = tuple(control for control in CONTROLS if control != "none")


def order(lengths: Sequence[int], steps: int, batch: int, seed: int) -> list[list[int]]:
    """Return the rows of each step. Rows of like length are together; every row comes once per epoch.

    Args:
        lengths: Of the rows, in characters, so that the order does not depend on the system.
        steps: Number of steps.
        batch: Rows per step.
        seed: Of the order.
    """
    generator, chosen = random.Random(seed), []
    while len(chosen) < steps * batch:
        chosen += generator.sample(range(len(lengths)), len(lengths))
    taken, grouped, wide = iter(chosen[: steps * batch]), [], 4 * batch
    while pool := list(islice(taken, wide)):
        pool.sort(key=lambda place: (lengths[place], place))
        groups = [pool[start : start + batch] for start in range(0, len(pool), batch)]
        grouped += generator.sample(groups, len(groups))
    return grouped


def losses_of(system: Baseline, rows: Rows) -> tuple[Tensor, int]:
    """Return the summed loss of the responses' tokens, and their number.

    Logits are computed for the responses alone: those of the prompts would take half of the head's time and memory.
    """
    batch = {name: value.to(system.model.device) for name, value in system.collate(rows).items()}
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    if isinstance(system, SoftCoT):
        return system.model(**batch)["loss"] * tokens, tokens
    labels = batch.pop("labels")
    kept = labels.shape[1] - min(len(prompt) for prompt, _ in rows) + 1
    logits = system.model(**batch, logits_to_keep=kept).logits[:, :-1]
    wanted = labels[:, 1 - kept :]
    predicted = wanted != -100
    return cross_entropy(logits[predicted].float(), wanted[predicted], reduction="sum"), tokens


def learn(system: Baseline, rows: Rows, steps: Sequence[Sequence[int]], training: Training) -> list[float]:
    """Train with AdamW, warm-up and linear decay; return the loss of each step per token.

    Args:
        system: A system with trained parameters.
        rows: All training rows.
        steps: Places of the rows of each step.
        training: Rate, warm-up and the weight of the contrastive term.
    """
    parameters = [each for each in system.model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, training.learning_rate, weight_decay=0.0)
    warm = max(1, round(training.warmup * len(steps)))
    rise = [min((step + 1) / warm, (len(steps) - step) / max(1, len(steps) - warm)) for step in range(len(steps))]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rise[min(step, len(rise) - 1)])
    history: list[float] = []
    system.model.train()
    for places in steps:
        total = sum(len(rows[place][1]) for place in places)
        history.append(0.0)
        for part in batches(places, MICRO):
            chosen = [rows[place] for place in part]
            loss, tokens = losses_of(system, chosen)
            history[-1] += float(loss.detach()) / total
            if training.contrast and len(part) > 1:
                with with_thoughts(system.model, "other_question"):
                    other = losses_of(system, chosen)[0]
                loss = loss + training.contrast * torch.relu(MARGIN * tokens + loss - other)
            (loss / total).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not norm.isfinite():
            raise FloatingPointError(f"The gradients of step {len(history)} must be finite, got a norm of {norm}.")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    system.model.eval()
    return history


def loss(system: Baseline, rows: Rows) -> float:
    """Return the mean loss per token of the responses.

    SoftCoT computes it as in a training step, without logits, which it only does with gradients enabled; nothing runs
    backward. The bases have no dropout.
    """
    softcot = isinstance(system, SoftCoT)
    system.model.train(softcot)
    places = sorted(range(len(rows)), key=lambda place: len(rows[place][0]) + len(rows[place][1]))
    total, count = 0.0, 0
    for part in batches(places, MICRO):
        with torch.set_grad_enabled(softcot):
            found, tokens = losses_of(system, [rows[place] for place in part])
        total, count = total + float(found.detach()), count + tokens
    system.model.eval()
    return total / count


def losses(system: Baseline, rows: Rows, mean: Tensor | None) -> dict[str, float]:
    """Return the loss, for SoftCoT also with changed thoughts, by control."""
    found = {}
    for control in LOSSES if mean is not None else ("own",):
        change = with_thoughts(system.model, control, mean) if mean is not None else nullcontext()
        with change:
            found[control] = loss(system, rows)
    return found


def precompute(system: SoftCoT, rows: Rows, asked: Rows | None = None) -> None:
    """Read the prompts once, so that training looks their thoughts up.

    Args:
        system: The system.
        rows: Rows whose prompts the base reads.
        asked: Rows whose prompts the assistant reads instead, one for each of `rows`.
    """
    compute, source = compute_thoughts(system.model), source_of(system.model)
    parts = []
    for part in batches(sorted(range(len(rows)), key=lambda place: len(rows[place][0])), 16):
        given: dict[str, Any] = {"input_ids": [rows[place][0] for place in part]}
        if asked is not None:
            read = system.left_padded([asked[place][0] for place in part])
            own = source.reader.read(*read, system.config.num_thought_tokens)
            given |= dict(zip(("assistant_input_ids", "assistant_attention_mask"), own, strict=True))
        parts.append(compute(given))
    joined: dict[str, Any] = {}
    for name in parts[0]:
        columns = [torch.as_tensor(part[name]) if name != "thoughts_fingerprint" else part[name] for part in parts]
        flat = name == "thoughts_fingerprint"
        joined[name] = [text for column in columns for text in column] if flat else torch.cat(columns)
    use_thoughts(system.model, joined)
