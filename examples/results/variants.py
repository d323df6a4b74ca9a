"""Variants of SoftCoT beyond arXiv 2502.12134: by name, the fields of the config that differ from plain SoftCoT."""

from __future__ import annotations

from typing import Any

NUMBERS_OF_CHAINS = (2, 4, 8)
# The linear projection of SoftCoT in other initialisations.
INITIALISATIONS: dict[str, dict[str, Any]] = {
    "zero": {"projection_init": "zero"},
    "matched": {"projection_init": "matched"},
}
# Other thought sources and projections.
PARTS: dict[str, dict[str, Any]] = {
    "base as source": {"thought_source": "base"},
    "base as source, identity": {"thought_source": "base", "projection_init": "identity"},
    "base as source, zero": {"thought_source": "base", "projection_init": "zero"},
    "mlp": {"projection": "mlp"},
    "per position": {"projection": "per_position"},
}
# SoftCoT++ (arXiv 2505.11484). A single chain has nothing to be kept apart from, so it has no contrastive term. Its
# weight is 0.1 unless the name says another.
CHAINS: dict[str, dict[str, Any]] = {f"K = 1, {kind}": {"chain_init": kind} for kind in ("trained", "fixed")} | {
    f"K = {number}, {kind}{'' if weight else ', no contrastive term'}": {
        "num_chains": number,
        "chain_init": kind,
        "contrastive_weight": weight,
    }
    for number in NUMBERS_OF_CHAINS
    for kind in ("trained", "fixed")
    for weight in (0.1, 0.0)
}
CHAINS |= {
    f"K = 4, trained, weight {weight:g}": {"num_chains": 4, "chain_init": "trained", "contrastive_weight": weight}
    for weight in (0.01, 0.001)
}
VARIANTS = INITIALISATIONS | PARTS | CHAINS
TUNED = (*INITIALISATIONS, *PARTS)  # each has a learning rate of its own; chains take SoftCoT's
# On strangers, where plain SoftCoT leaves room.
ON_STRANGERS = (*PARTS, "K = 4, trained", "K = 4, fixed")
