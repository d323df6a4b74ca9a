"""Detects stale thoughts, by a fingerprint of what they depend on besides the prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..sources import ThoughtSource

_FORMAT = 1  # version of keys and columns
N = "num_thought_tokens"


def fingerprint(source: ThoughtSource, num_thoughts: int | None) -> dict[str, Any]:
    """Return what the states of a source depend on, the format of the columns, and N if it is known."""
    return {**source.fingerprint(), "format": _FORMAT, N: num_thoughts}


def to_json(found: Mapping[str, Any]) -> str:
    """Serialise a fingerprint."""
    return json.dumps(found, sort_keys=True)


def refuse_stale(stored: Iterable[Mapping[str, Any]], source: ThoughtSource) -> None:
    """Reject thoughts whose fingerprints do not match an adapter's source.

    Raises:
        ValueError: A fingerprint differs. The message lists the differences.
    """
    config, now = source.config, fingerprint(source, None)
    wanted = {config.num_thought_tokens, config.inference_num_thought_tokens}
    for found in stored:
        num = found.get(N)
        fits = num in wanted or config.thought_token is not None  # a run may have any length
        expected = now | {N: num if fits else config.num_thought_tokens}
        if differing := [name for name in expected if found.get(name) != expected[name]]:
            parts = "; ".join(f"`{name}` was {found.get(name)!r} and is {expected[name]!r}" for name in differing)
            raise ValueError(
                f"`dataset` must hold thoughts of this adapter, but what they were computed with differs: {parts}. "
                "Compute them again with `dataset.map(compute_thoughts(model), batched=True, batch_size=16)`, or "
                "attach the adapter that they are for."
            )
