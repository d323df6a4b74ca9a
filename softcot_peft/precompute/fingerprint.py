"""Detects stale thoughts, by a fingerprint of what they depend on besides the prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..sources import ThoughtSource
from .lookup import GIVEN, INPUT

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

    Thoughts that were computed from the caller's `assistant_input_ids` match if everything else does: only the caller
    can know what the assistant should read. They do not mix with thoughts that were computed from the prompts.

    Raises:
        ValueError: A fingerprint differs, and the message lists the differences; or the assistant read prompts for
            some rows and `assistant_input_ids` for others.
    """
    stored, config, now = list(stored), source.config, fingerprint(source, None)
    inputs = {found.get(INPUT) for found in stored}
    if len(inputs) > 1:
        raise ValueError(
            "`dataset` must hold thoughts of one kind of input, but some were computed from `assistant_input_ids` and "
            "some from the prompts. Compute all of them with, or all without, the column `assistant_input_ids`."
        )
    if inputs == {GIVEN}:
        now[INPUT] = GIVEN
    wanted = {config.num_thought_tokens, config.inference_num_thought_tokens}
    for found in stored:
        num = found.get(N)
        fits = num in wanted or config.thought_token is not None  # a run may have any length
        expected = now | {N: num if fits else config.num_thought_tokens}
        names = dict.fromkeys([*expected, *found])
        if differing := [name for name in names if found.get(name) != expected.get(name)]:
            parts = "; ".join(f"`{name}` was {found.get(name)!r} and is {expected.get(name)!r}" for name in differing)
            raise ValueError(
                f"`dataset` must hold thoughts of this adapter, but what they were computed with differs: {parts}. "
                "Compute them again with `dataset.map(compute_thoughts(model), batched=True, batch_size=16)`, or "
                "attach the adapter that they are for."
            )
