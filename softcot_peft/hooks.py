"""Hooks on the base itself, so that every route to it is the same function.

A forward pre-hook translates the caller's inputs into what the base sees, runs the assistant and hands the soft
thoughts to the embedding layer; a forward hook puts the outputs back in line with the caller's tokens.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import inputs as forward_inputs
from ._compat import accepts, argument_names, cache_length, find_cache
from .columns import restore, restore_keys
from .generation import RUNNING, Generation, generate, prepare_cache
from .layer import WRITING, SoftCoTLayer, Writing
from .placement import Placement, positions
from .reader import PromptReader
from .thinker import Thinker

_RECORD = "softcot_placement"  # attribute of a cache: where the thoughts stand in it


@dataclass(frozen=True)
class Pass:
    """A running forward pass of a base, from the pre-hook to the forward hook.

    Args:
        model: The base.
        length: The caller's columns in this pass.
        placement: Where the thoughts stand; `None` in a chunk of the prompt before them.
        writing: What the embedding layer writes; `None` when thoughts are in the cache or in the embeddings passed.
        places: Whether the thought positions are among this pass's columns.
        kept: The caller's columns whose logits were asked for, when both of their possible rows were computed.
        last_rows: Whether only the last rows of logits were asked for.
        outer: The pass that was running before.
    """

    model: nn.Module
    length: int
    placement: Placement | None = None
    writing: Writing | None = None
    places: bool = False
    kept: Tensor | None = None
    last_rows: bool = False
    outer: Pass | None = None


_PASS: ContextVar[Pass | None] = ContextVar("softcot_pass", default=None)


class ThoughtHooks:
    """The hooks and the `generate` of one base, installed once and shared by all of its SoftCoT adapters.

    Args:
        model: The base.
        layer: Its wrapped input embedding.
    """

    def __init__(self, model: PreTrainedModel, layer: SoftCoTLayer) -> None:
        self.model = model
        self.layer = layer
        self.thinker = Thinker(model, layer)
        self.names = argument_names(model)
        self.takes_positions = accepts(type(model).forward, "position_ids")
        self._handles = [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            model.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True),
        ]
        self._replaced: dict[str, Any] = {}
        if hasattr(model, "generate"):
            self._replace("generate", functools.partial(generate, self.thinker))
            self._replace("_prepare_cache_for_generation", prepare_cache)

    def _replace(self, name: str, method: Callable[..., Any]) -> None:
        """Put a method on the model instance, keeping what was there; the original comes as its first argument."""
        self._replaced[name] = self.model.__dict__.get(name)
        original = getattr(self.model, name)
        setattr(self.model, name, functools.wraps(original)(functools.partial(method, original)))

    def remove(self) -> None:
        """Take the hooks and methods off the model again."""
        for handle in self._handles:
            handle.remove()
        for name, earlier in self._replaced.items():
            delattr(self.model, name)
            if earlier is not None:
                setattr(self.model, name, earlier)

    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Translate the caller's inputs into what the base sees; nothing when adapters are disabled."""
        reader = self.layer.active_reader()
        if reader is None:
            if not any(name in kwargs for name in forward_inputs.OWN_NAMES):
                return None
            forward_inputs.pop_own(kwargs)
            return args, kwargs
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache, generation = find_cache(inputs), RUNNING.get()
        if generation is not None and generation.model is model:
            running = self._generation_pass(generation, inputs, reader, cache)
        elif cache_length(cache) > 0:
            running = self._next_tokens(inputs, getattr(cache, _RECORD, None), cache)
        else:
            running = self._whole_rows(inputs, reader)
        _PASS.set(replace(running, outer=_PASS.get()))
        WRITING.set(running.writing)
        return (), inputs

    def after_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Put the outputs back in line with the caller's tokens; called also when the forward raised."""
        running = _PASS.get()
        if running is None or running.model is not model:
            return None
        _PASS.set(running.outer)
        WRITING.set(None if running.outer is None else running.outer.writing)
        placement = running.placement
        if output is None or placement is None:
            return None
        if running.places and RUNNING.get() is None and isinstance(output, dict):
            cache = find_cache(output)
            if cache is not None and not isinstance(cache, (Tensor, tuple, list)):
                setattr(cache, _RECORD, placement)
        if not placement.inserted:
            return None
        start, num = placement.start, placement.num_thoughts
        if running.places:
            return restore(output, start, num, running.length, running.kept, running.last_rows)
        if isinstance(output, dict) and output.get("attentions"):
            output["attentions"] = restore_keys(output["attentions"], start, num)
        return output

    def _whole_rows(self, inputs: dict[str, Any], reader: PromptReader) -> Pass:
        """Whole rows, outside of `generate`: find the thoughts' place, run the assistant, insert."""
        own = forward_inputs.pop_own(inputs)
        forward_inputs.check(inputs, own)
        placement = self.thinker.locate(inputs, reader)
        self._warn_unread(inputs, placement)
        thoughts = self.thinker.think(inputs.get("input_ids"), placement, reader, **own)
        if placement.padded and self.takes_positions and inputs.get("position_ids") is None:
            inputs["position_ids"] = positions(inputs["attention_mask"])
        return self._place(inputs, placement, thoughts, reader)

    def _warn_unread(self, inputs: dict[str, Any], placement: Placement) -> None:
        """Warn where no row of the logits but the last would read the thoughts."""
        labelled = inputs.get("labels") is not None or inputs.get("shift_labels") is not None
        if placement.inserted and not labelled and inputs.get("logits_to_keep") != 1:
            warnings.warn(
                "Without `labels`, thoughts stand after the last token of each row, and the logits of all rows before "
                "are the plain base's. If a response is among the tokens (a loss or log-likelihoods computed outside "
                "of the model, label smoothing), write a run of `thought_token` before it. If only the next token is "
                "wanted, pass `logits_to_keep=1`.",
                stacklevel=2,
            )

    def _place(
        self, inputs: dict[str, Any], placement: Placement, thoughts: Tensor, reader: PromptReader, seen: int = 0
    ) -> Pass:
        """Insert the thought positions and say what is to be written."""
        batch, length = forward_inputs.tokens(inputs).shape[:2]
        kept, last_rows = forward_inputs.place(inputs, placement, thoughts, self.thinker.filler(reader), seen)
        start, writing = placement.start - seen, None
        if inputs.get("inputs_embeds") is None:
            writing = Writing(self.layer, thoughts, start, torch.Size((batch, length + placement.num_inserted)))
        here = replace(placement, start=start)
        return Pass(self.model, length, here, writing, places=True, kept=kept, last_rows=last_rows)

    def _generation_pass(
        self, generation: Generation, inputs: dict[str, Any], reader: PromptReader, cache: Any
    ) -> Pass:
        """A pass of `generate`: the prompts, a chunk of them, the next tokens, or all tokens again without a cache."""
        batch, length = forward_inputs.tokens(inputs).shape[:2]
        placement = generation.placement.expand(batch)
        if generation.prefilled and cache is not None:
            return self._next_tokens(inputs, placement, cache)
        seen = 0 if generation.prefilled else generation.consumed
        if generation.prefilled and length < generation.length:
            raise RuntimeError(
                f"`generate` passed {length} tokens, fewer than the prompt's {generation.length}, and no cache that "
                f"holds the rest, so {type(self.model).__name__} cannot carry thoughts while decoding. Report it."
            )
        generation.consumed = seen + length
        if placement.inserted and not generation.prefilled:
            return Pass(self.model, length)  # the thoughts come after the last chunk
        thoughts = generation.thoughts.repeat_interleave(batch // len(generation.thoughts), dim=0)
        return self._place(inputs, placement, thoughts, reader, seen)

    def _next_tokens(self, inputs: dict[str, Any], placement: Placement | None, cache: Any) -> Pass:
        """Tokens after a cache that holds the thoughts."""
        if placement is None:
            raise ValueError(
                "`past_key_values` must come from a pass with thoughts, but holds tokens that were read without. "
                "Start from an empty cache, with the whole prompt in `input_ids`, or disable the adapter."
            )
        forward_inputs.pop_own(inputs)
        batch, length = forward_inputs.tokens(inputs).shape[:2]
        placement = placement.expand(batch)
        forward_inputs.move_up(inputs, placement, cache, self.takes_positions)
        return Pass(self.model, length, placement)
