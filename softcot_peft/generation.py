"""`generate` with thoughts: one assistant pass per prompt, and everything else in the caller's tokens.

`generate` never meets a thought position: its forward passes are translated one by one by the hooks, so penalties,
bans, stop strings, streamers, lengths, scores and drafts see what they see without an adapter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig, PreTrainedModel

from . import inputs as forward_inputs
from ._compat import CACHE_NAME, cache_length, checkpoints, find_cache, is_dynamic
from .caches import check_room, forget
from .placement import Placement, align_left, trailing
from .reader import PromptReader
from .thinker import Thinker

# Arguments that are picked by row where prompts are read once: `(B, L)` or `(B, L, H)`.
_PICKED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
# How many tokens `generate` writes where nobody says (transformers 5.23).
_DEFAULT_NEW = 20


@dataclass
class Generation:
    """A running `generate` call."""

    model: nn.Module  # the base
    placement: Placement  # where the thoughts stand in the prompts, which end in the last column
    # The assistant's hidden states at the thought positions of D distinct prompts, `(D, N, H_assistant)`.
    hidden: Tensor
    length: int  # columns of the prompts
    first: Tensor  # the first row of each distinct prompt, `(D,)`
    source: Tensor  # which distinct prompt each row has, `(B,)`
    consumed: int = 0  # columns that the base has read so far; fewer than `length` during chunked prefill
    _expanded: Placement | None = None

    def placement_of(self, rows: int) -> Placement:
        """The placement with every row repeated for its beams or returned sequences, made once."""
        if self._expanded is None or len(self._expanded.start) != rows:
            self._expanded = self.placement.expand(rows)
        return self._expanded

    def sources(self, rows: int) -> Tensor:
        """Which distinct prompt each of `rows` rows has: beams and returned sequences follow their row."""
        return self.source.repeat_interleave(rows // len(self.source))

    def shares(self, inputs: dict[str, Any], cache: Any) -> bool:
        """Whether a pass over all prompts can be made for the distinct ones alone, and its cache be copied then."""
        batch, length = forward_inputs.tokens(inputs).shape[:2]
        return (
            len(self.first) < batch
            and length == self.length
            and is_dynamic(cache)
            and all(_is_single(value) or _is_picked(name, value, batch, length) for name, value in inputs.items())
            and not any(inputs.get(name) for name in forward_inputs.PER_TOKEN_OUTPUTS)
        )

    def distinct(self, inputs: dict[str, Any]) -> Placement:
        """Keep the first row of each distinct prompt in a pass's arguments, and return where their thoughts stand."""
        times = len(forward_inputs.tokens(inputs)) // len(self.source)
        inputs.update({name: inputs[name][times * self.first] for name in inputs if not _is_single(inputs[name])})
        return self.placement.select(self.first)

    @property
    def prefilled(self) -> bool:
        """Whether the base has read the prompts."""
        return self.consumed >= self.length


RUNNING: ContextVar[Generation | None] = ContextVar("softcot_generation", default=None)


def generate(thinker: Thinker, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The base's `generate`, with the active adapter's thoughts.

    Right-padded prompts are aligned to the left first, since new tokens continue the last column; the result shows the
    caller's prompts as they were.

    Raises:
        ValueError: The prompts cannot carry thoughts, or an option would run the base without them.
    """
    own = forward_inputs.pop_own(kwargs)
    reader = thinker.layer.active_reader()
    if reader is None:
        return original(*args, **kwargs)
    model = thinker.model
    bound = inspect.signature(original).bind(*args, **kwargs).arguments
    inputs = {**bound.pop("kwargs", {}), **bound}
    if inputs.get("inputs") is not None and inputs.get("input_ids") is None:
        inputs["input_ids"] = inputs.pop("inputs")
    for name in ("labels", "shift_labels"):  # trainers that evaluate with `generate` pass them
        inputs.pop(name, None)
    _check_options(inputs, model)
    forward_inputs.check(inputs, own)
    if inputs.get("attention_mask") is None:
        inputs["attention_mask"] = _infer_mask(inputs, model)
    prompt, length = inputs.get("input_ids"), forward_inputs.tokens(inputs).shape[1]
    generation = _start(thinker, inputs, reader, own)
    token = RUNNING.set(generation)
    try:
        result = original(**inputs)
    finally:
        RUNNING.reset(token)
    if prompt is not None and inputs["input_ids"] is not prompt:  # it was aligned
        sequences = result if isinstance(result, Tensor) else result.sequences
        sequences[:, :length] = prompt.repeat_interleave(len(sequences) // len(prompt), dim=0)
    return result


def _start(
    thinker: Thinker, inputs: dict[str, Any], reader: PromptReader, own: dict[str, Tensor | None]
) -> Generation:
    """Place the thoughts, have the assistant think, and align right-padded prompts to the left, within the dict."""
    placement, model = thinker.locate(inputs, reader), thinker.model
    mask, cache = inputs["attention_mask"], find_cache(inputs)
    new = _most_new(inputs, model, mask.shape[1])
    check_room(model, cache, inputs, mask.shape[1], placement.num_inserted, new)
    forget(cache)  # it is empty, but may have been used before
    distinct, source = _distinct_rows(model, inputs, own, mask)
    ids = inputs.get("input_ids")
    few = placement if len(distinct) == len(source) else placement.select(distinct)
    hidden = thinker.think(ids if ids is None else ids[distinct], few, reader, **own)
    if placement.padded and (mask[:, -1] == 0).any():
        for name, value in inputs.items():
            if name == "position_ids" and isinstance(value, Tensor):  # may have more axes before, and one row for all
                by_row = value.expand(*value.shape[:-2], *mask.shape).movedim((-2, -1), (0, 1))
                inputs[name] = align_left(by_row, mask).movedim((0, 1), (-2, -1))
            elif name != "attention_mask" and isinstance(value, Tensor) and value.shape[:2] == mask.shape:
                inputs[name] = align_left(value, mask)
        start = placement.start + trailing(mask)
        inputs["attention_mask"] = align_left(mask, mask)
        earliest, latest = (int(end) for end in start.aminmax())
        mask = inputs["attention_mask"]
        placement = replace(placement, start=start, attention_mask=mask, latest=latest, earliest=earliest)
    return Generation(model, placement, hidden, mask.shape[1], distinct, source)


def _is_single(value: Any) -> bool:
    """Whether an argument of a forward cannot differ by row, as tensors, lists and dicts may."""
    return value is None or isinstance(value, (bool, int, float, str, Cache, PretrainedConfig))


def _is_picked(name: str, value: Any, batch: int, length: int) -> bool:
    known = name in _PICKED and isinstance(value, Tensor) and value.dim() == 2 + (name == "inputs_embeds")
    return known and value.shape[:2] == (batch, length)


def _distinct_rows(
    model: PreTrainedModel, inputs: dict[str, Any], own: dict[str, Tensor | None], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Which rows are the first of their prompt, `(D,)`, and which of these each row repeats, `(B,)`.

    Samples of one prompt are often asked for as rows next to each other. They share its thoughts and its prefill,
    unless the model is to be given anything else that may differ by row.
    """
    rows, ids = torch.arange(len(mask), device=mask.device), inputs.get("input_ids")
    known = {"input_ids", "attention_mask", "tokenizer", "assistant_tokenizer"}
    known |= {*inspect.signature(model.generate).parameters, *vars(model.generation_config)}  # type: ignore[arg-type]
    others = [value for name, value in {**inputs, **own}.items() if name not in known]
    if len(rows) == 1 or ids is None or not all(map(_is_single, others)):
        return rows, rows
    both = torch.cat([ids, mask.to(ids)], 1)
    new = torch.cat([rows[:1] == 0, (both[1:] != both[:-1]).any(1)])
    return rows[new], new.cumsum(0) - 1


def _option(name: str, inputs: dict[str, Any], model: PreTrainedModel) -> Any:
    """A generation option from where `generate` looks for it: the call, the config passed, the model's config."""
    if inputs.get(name) is not None:
        return inputs[name]
    for config in (inputs.get("generation_config"), model.generation_config):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def _most_new(inputs: dict[str, Any], model: PreTrainedModel, length: int) -> int:
    """How many tokens `generate` may write after prompts of a length, at least 1."""
    new, longest = (_option(name, inputs, model) for name in ("max_new_tokens", "max_length"))
    if new is None and longest is None:
        longest = getattr(model.config, "max_position_embeddings", None) or length + _DEFAULT_NEW
        new = min(_DEFAULT_NEW, longest - length)
    return max(longest - length if new is None else new, 1)


def _check_options(inputs: dict[str, Any], model: PreTrainedModel) -> None:
    """Refuse options of `generate` under which the base would run without its thoughts."""
    if _option("is_assistant", inputs, model):  # as transformers' candidate generators call their draft (5.23)
        raise ValueError(
            "`assistant_model` must not have an active SoftCoT adapter: a draft goes on from its own cache, call by "
            "call, and has no prompt for thoughts. Pass the plain base as the draft, or disable the draft's adapter."
        )
    if cache_length(find_cache(inputs)) > 0:
        raise ValueError(
            f"`{CACHE_NAME}` must be empty: thoughts belong to the end of the whole prompt, so a second turn "
            "cannot continue an old cache. Pass the whole conversation in `input_ids`."
        )
    if model.training and checkpoints(model) and _option("use_cache", inputs, model) is not False:
        raise ValueError(
            "`use_cache` must be False while gradient checkpointing is on in training mode, where transformers drops "
            "the cache that `generate` goes on from. Call `model.eval()` or `gradient_checkpointing_disable()` first."
        )
    refused = {
        "guidance_scale": lambda value: value not in (None, 1),
        "token_healing": bool,
        "assistant_early_exit": lambda value: value is not None,
        "cache_implementation": lambda value: value == "paged",
    }
    for name, refuses in refused.items():
        value = _option(name, inputs, model)
        if refuses(value):
            raise ValueError(
                f"`{name}` must not be {value!r}: it runs the base in a way that cannot carry thoughts. Leave it "
                "out, or disable the adapter."
            )


def _infer_mask(inputs: dict[str, Any], model: PreTrainedModel) -> Tensor:
    """The mask that `generate` infers from the pad token where the caller gives none: `(B, L)`."""
    ids = inputs.get("input_ids")
    pad, eos = (_option(name, inputs, model) for name in ("pad_token_id", "eos_token_id"))
    if ids is None or pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        reference = forward_inputs.tokens(inputs)
        return torch.ones(reference.shape[:2], dtype=torch.long, device=reference.device)
    mask = ids != pad
    return (mask | ~mask.any(1, keepdim=True)).long()  # a row of these alone is a text of them


def prepare_cache(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make room for the thoughts in caches of a fixed size.

    `_prepare_cache_for_generation` is private in transformers, and the only place where such a cache gets its length
    from the caller's `max_length` (5.23).
    """
    bound = inspect.signature(original).bind(*args, **kwargs)
    generation = RUNNING.get()
    if generation is None or generation.model is not getattr(original, "__self__", None):
        return original(*bound.args, **bound.kwargs)
    bound.arguments["max_cache_length"] += generation.placement.num_inserted
    return original(*bound.args, **bound.kwargs)
