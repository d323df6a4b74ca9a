"""Wraps the base's `generate`: the source reads each prompt once, and `generate` sees only the caller's tokens.

The hooks translate each forward pass, so thought positions never reach `generate`. Penalties, banned tokens, stop
strings, streamers, lengths, scores and draft models see the same as without an adapter.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..compat.caches import find_cache
from ..rows.arguments import pop_own, repeat_for_chains, tokens
from ..rows.checks import check_arguments
from ..rows.placement import Placement, align_left, trailing
from ..sources import ThoughtSource
from .cache_record import check_room, forget
from .generation import GENERATION, Generation, distinct_rows, running_generation
from .host import Host
from .options import check_chunks, check_options, infer_mask, max_new
from .shared_prompt import shares_prompts


def generate(host: Host, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the base's `generate` with the active adapter's thoughts.

    Right-padded prompts become left-padded, because new tokens follow the last column. The result still contains the
    caller's prompts as they were.

    With several chains, a prompt has an answer for each of them, in adjacent rows, as with `num_return_sequences`.

    Raises:
        ValueError: The prompts cannot be combined with thoughts, or an option would run the base without them.
    """
    own = pop_own(kwargs)
    requested, source = own.pop("chains"), host.layer.active_source()
    if source is None:
        return original(*args, **kwargs)
    chains = source.select_chains(requested)
    bound = inspect.signature(original).bind(*args, **kwargs).arguments
    inputs = {**bound.pop("kwargs", {}), **bound}
    if inputs.get("inputs") is not None and inputs.get("input_ids") is None:
        inputs["input_ids"] = inputs.pop("inputs")
    for name in ("labels", "shift_labels"):  # passed by trainers that evaluate with `generate`
        inputs.pop(name, None)
    check_options(inputs, host.model)
    check_arguments(inputs, own)
    if inputs.get("attention_mask") is None:
        inputs["attention_mask"] = infer_mask(inputs, host.model)
    prompt, length = inputs.get("input_ids"), tokens(inputs).shape[1]
    with torch.no_grad():  # as in `generate` itself: chains may be trained through the assistant
        generation = _start(host, inputs, source, own, chains)
    token = GENERATION.set(generation)
    try:
        result = original(**inputs)
    finally:
        GENERATION.reset(token)
    if prompt is not None and inputs["input_ids"] is not prompt:  # the prompts were aligned
        sequences = result if isinstance(result, Tensor) else result.sequences
        sequences[:, :length] = prompt.repeat_interleave(len(sequences) // len(prompt), dim=0)
    return result


def _start(
    host: Host,
    inputs: dict[str, Any],
    source: ThoughtSource,
    own: dict[str, Tensor | None],
    chains: tuple[int, ...],
) -> Generation:
    """Locate the thoughts, run the source on the prompts, and change the prompts in place.

    Right-padded prompts become left-padded, and each is repeated for its chains.
    """
    placement, model = host.locate(inputs, source), host.model
    mask, cache = inputs["attention_mask"], find_cache(inputs)
    new = max_new(inputs, model, mask.shape[1])
    check_room(model, cache, inputs, mask.shape[1], placement.num_inserted, new)
    forget(cache)  # empty, but it may have been used before
    first, prompt = distinct_rows(model, inputs, own, mask)
    ids = inputs.get("input_ids")
    distinct = placement if len(first) == len(prompt) else placement.select(first)
    read = functools.partial(host.read, ids if ids is None else ids[first], distinct, source, own, chains=chains)
    if placement.padded and (mask[:, -1] == 0).any():
        placement = _align(inputs, placement, mask)
    check_chunks(inputs, model, placement)
    placement = repeat_for_chains(inputs, placement, len(chains))
    each = torch.arange(len(chains), device=first.device)
    first, prompt = ((rows[:, None] * len(chains) + each).flatten() for rows in (first, prompt))
    generation = Generation(model, placement, read, mask.shape[1], first, prompt)
    if inputs.get("position_ids") is not None or not shares_prompts(host, source, placement, own):
        _ = generation.states  # before anything of the base runs
    return generation


def _align(inputs: dict[str, Any], placement: Placement, mask: Tensor) -> Placement:
    """Make right-padded prompts left-padded; returns their new placement."""
    for name, value in inputs.items():
        if name == "position_ids" and isinstance(value, Tensor):  # may have leading axes, and one row for all
            by_row = value.expand(*value.shape[:-2], *mask.shape).movedim((-2, -1), (0, 1))
            inputs[name] = align_left(by_row, mask).movedim((0, 1), (-2, -1))
        elif name != "attention_mask" and isinstance(value, Tensor) and value.shape[:2] == mask.shape:
            inputs[name] = align_left(value, mask)
    start = placement.start + trailing(mask)
    inputs["attention_mask"] = aligned = align_left(mask, mask)
    earliest, latest = (int(end) for end in start.aminmax())
    return replace(placement, start=start, attention_mask=aligned, latest=latest, earliest=earliest)


def prepare_cache(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Add room for the thoughts to static caches.

    `_prepare_cache_for_generation` is private in transformers, but the only method that derives the length of such a
    cache from the caller's `max_length` (5.23).
    """
    bound = inspect.signature(original).bind(*args, **kwargs)
    generation = running_generation(getattr(original, "__self__", None))
    if generation is not None:
        bound.arguments["max_cache_length"] += generation.placement.num_inserted
    return original(*bound.args, **bound.kwargs)
