"""What the states before the projection hold: how far they differ, and what a linear probe finds in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softcot_peft import compute_thoughts

from .systems import RealSoftCoT, batches
from .training import Rows

STRENGTHS = (1e-2, 1e-1, 1.0, 10.0, 100.0)
FOLDS = 5


def states(system: RealSoftCoT, rows: Rows) -> Tensor:
    """Return the source's states at the thought positions, `(Q, N * H)`."""
    compute, found = compute_thoughts(system.model), []
    places = sorted(range(len(rows)), key=lambda place: len(rows[place][0]))
    for part in batches(places, 16):
        batch = compute({"input_ids": [rows[place][0] for place in part]})
        found.append(torch.as_tensor(batch["assistant_hidden_states"]).flatten(1).float())
    return torch.cat(found)[torch.tensor(places).argsort()]


@torch.no_grad()
def standardize(system: RealSoftCoT, rows: Rows) -> None:
    """Have the projection read states with mean 0 at each position, and variance 1 in each dimension, over these rows.

    Thoughts keep their mean norm. Those beyond N in training use the mean of the last position.
    """
    projection = system.model.get_input_embeddings().softcot_projection["default"]
    found = states(system, rows).unflatten(1, (system.config.num_thought_tokens, -1)).to(system.model.device)
    middle = found.mean(0)  # (N, H)
    width = (found - middle).std((0, 1)) + 1e-6  # (H)
    norm = projection(found).norm(dim=-1).mean()

    def read(module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        place = torch.arange(inputs[0].shape[-2]).clamp(max=len(middle) - 1)
        return ((inputs[0].float() - middle[place]) / width,)

    projection.register_forward_pre_hook(read)
    projection.rescale(float(norm / projection(found).norm(dim=-1).mean()))


def spread(found: Tensor) -> dict[str, float]:
    """Return how far states `(Q, N, H)` differ between questions.

    Returns:
        `norm`, their mean norm; `cosine`, the mean cosine between two questions' states at a position; and `share`,
        the share of their squared norm that is left when each position's mean over the questions is subtracted.
    """
    unit = torch.nn.functional.normalize(found, dim=-1).transpose(0, 1)  # (N, Q, H)
    pairs = torch.tril_indices(len(found), len(found), -1)
    centred = found - found.mean(0)
    return {
        "norm": float(found.norm(dim=-1).mean()),
        "cosine": float((unit @ unit.mT)[:, pairs[0], pairs[1]].mean()),
        "share": float(centred.square().sum() / found.square().sum()),
    }


def predicted(known: Tensor, wanted: Tensor, new: Tensor, strength: float) -> Tensor:
    """Return the predicted classes of new rows, by ridge regression to one-hot targets in its dual form.

    Args:
        known: `(Q, F)`.
        wanted: Classes, one-hot, `(Q, C)`.
        new: `(R, F)`.
        strength: Of the penalty, relative to the mean squared norm of the rows.
    """
    middle, scale = known.mean(0), known.std(0) + 1e-6
    known, new = (known - middle) / scale, (new - middle) / scale
    kernel, offset = known @ known.T, wanted.mean(0)
    penalty = strength * kernel.diagonal().mean() * torch.eye(len(known))
    return (new @ known.T @ torch.linalg.solve(kernel + penalty, wanted - offset) + offset).argmax(1)


def probe(found: Tensor, answers: Sequence[str]) -> dict[str, Any]:
    """Return which answers a probe predicts, each from the other folds, and which the most frequent answer hits.

    The penalty's strength is chosen within the other folds.

    Args:
        found: States, `(Q, F)`.
        answers: One per row.

    Raises:
        ValueError: There are too few rows.
    """
    if len(answers) < 2 * FOLDS:
        raise ValueError(f"`answers` must be at least {2 * FOLDS}, two for each fold, got {len(answers)}.")
    classes = sorted(set(answers))
    target = torch.tensor([classes.index(answer) for answer in answers])
    hot = torch.nn.functional.one_hot(target, len(classes)).float()
    fold = torch.arange(len(answers)) % FOLDS
    right, most = torch.zeros(len(answers)), [0] * len(answers)
    for out in range(FOLDS):
        inner = (out + 1) % FOLDS
        fit, check, test = (fold != out) & (fold != inner), fold == inner, fold == out
        scores = {
            each: (predicted(found[fit], hot[fit], found[check], each) == target[check]).float().mean().item()
            for each in STRENGTHS
        }
        strength = max(STRENGTHS, key=lambda each: (scores[each], each))
        right[test] = (predicted(found[~test], hot[~test], found[test], strength) == target[test]).float()
        frequent = Counter(target[~test].tolist()).most_common(1)[0][0]
        for place in test.nonzero()[:, 0].tolist():
            most[place] = int(target[place] == frequent)
    return {"right": right.int().tolist(), "most_frequent": most, "classes": len(classes)}
