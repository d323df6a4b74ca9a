"""Hooks on the base itself, so that every route to it is the same function.

A forward pre-hook translates the caller's inputs into what the base sees, runs the assistant and hands its
hidden states to the embedding layer; a forward hook puts the outputs back in line with the caller's tokens.
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
from ._compat import CACHE_NAME, argument_names, cache_length, find_cache, takes_positions, uncompiled
from .caches import check_room, recall, remember
from .columns import repeat_rows, restore, restore_keys
from .doors import Replaced, backbones, close, refuse_backbone
from .generation import RUNNING, Generation, generate, prepare_cache
from .layer import WRITING, SoftCoTLayer, Writing
from .placement import Placement, positions
from .reader import PromptReader
from .thinker import THINKING, Thinker
from .two_passes import Rows, TwoPasses


@dataclass(frozen=True)
class Pass:
    """A running forward pass of a base, from the pre-hook to the forward hook."""

    model: nn.Module  # the base
    length: int  # the caller's columns in this pass
    placement: Placement | None = None  # where the thoughts stand; `None` in a chunk of the prompt before them
    # What the embedding layer writes; `None` when thoughts are in the cache or in the embeddings passed.
    writing: Writing | None = None
    places: bool = False  # whether the thought positions are among this pass's columns
    # The caller's columns whose logits were asked for, when both of their possible rows were computed.
    kept: Tensor | None = None
    last_rows: bool = False  # whether only the last rows of logits were asked for
    # Which of this pass's rows each row of the caller's repeats, `(B,)`; `None` where all are the caller's.
    repeats: Tensor | None = None
    # The rows of a training step whose prompts were run before; `None` in all other passes.
    divided: Rows | None = None
    outer: Pass | None = None  # the pass that was running before


_PASS: ContextVar[Pass | None] = ContextVar("softcot_pass", default=None)


class ThoughtHooks:
    """The hooks and the `generate` of one base, installed once and shared by all of its SoftCoT adapters.

    Compilers run the hooks as they are: they think once a prompt, and their state is that of a thread.
    """

    def __init__(self, model: PreTrainedModel, layer: SoftCoTLayer, loading: Callable[..., Any]) -> None:
        self.model = model
        self.layer = layer
        self.thinker = Thinker(model, layer)
        self.names = argument_names(model)
        self.takes_positions = takes_positions(model)
        self.two_passes = TwoPasses(model, self.names, self.takes_positions, self._run_part)
        self._handles = [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            model.register_forward_hook(self.after_forward, with_kwargs=True),
            *(backbone.register_forward_pre_hook(self.before_backbone) for backbone in backbones(model, layer)),
        ]
        self._leads_head = False
        self._warned_late = False
        self._replaced = [
            *close(model, layer),
            Replaced(model, "_load_pretrained_model", loading),
        ]
        if hasattr(model, "generate"):
            self._replaced.append(Replaced(model, "generate", functools.partial(generate, self.thinker)))
            self._replaced.append(Replaced(model, "_prepare_cache_for_generation", prepare_cache))
        # `Module.__call__` finds this on the instance. Private in torch (2.6 to 2.13), and the only place around hooks
        # and forward: hooks registered with `always_call` are not called for a KeyboardInterrupt.
        model.__dict__["_call_impl"] = self._call_impl

    def remove(self) -> None:
        """Take the hooks and methods off the model again."""
        for handle in self._handles:
            handle.remove()
        for method in reversed(self._replaced):
            method.remove()
        del self.model.__dict__["_call_impl"]

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; whatever is raised on the way, no trace of the pass stays."""
        call = functools.partial(nn.Module._call_impl, self.model)
        if torch.compiler.is_compiling():
            return call(*args, **kwargs)
        outer = _PASS.get(), WRITING.get()
        try:
            return call(*args, **kwargs)
        except BaseException:
            _PASS.set(outer[0])
            WRITING.set(outer[1])
            raise

    @uncompiled
    def before_backbone(self, backbone: nn.Module, args: Any) -> None:
        """Refuse calls of the backbone that do not come from the base: they would run without thoughts."""
        running = _PASS.get()
        inside = running is not None and running.model is self.model
        if not inside and not THINKING.get() and self.layer.active_name() is not None:
            refuse_backbone(self.model, backbone)

    @uncompiled
    def before_head(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Have the loss of a training step computed in the place of the head."""
        running = _PASS.get()
        rows = None if running is None or running.model is not self.model else running.divided
        return None if rows is None or rows.head is None else (rows.head.stand_in(args[0]), *args[1:])

    @uncompiled
    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Translate the caller's inputs into what the base sees; nothing when adapters are disabled."""
        reader = self.layer.active_reader()
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs} if args else kwargs.copy()
        cache, generation = find_cache(inputs), RUNNING.get()
        if reader is None:
            if cache is not None:
                recall(cache, None, inputs)
            if not any(name in kwargs for name in forward_inputs.OWN_NAMES):
                return None
            forward_inputs.pop_own(kwargs)
            return args, kwargs
        if generation is not None and generation.model is model:
            running = self._generation_pass(generation, inputs, reader, cache)
        elif cache_length(cache) > 0:
            placement = recall(cache, self.layer.active_name(), inputs)
            self._refuse_late_run(inputs, reader)
            running = self._next_tokens(inputs, placement, cache)
        else:
            running = self._whole_rows(inputs, reader)
        _PASS.set(replace(running, outer=_PASS.get()))
        WRITING.set(running.writing)
        return (), inputs

    @uncompiled
    def after_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Put the outputs back in line with the caller's tokens."""
        running = _PASS.get()
        if running is None or running.model is not model:
            return None
        _PASS.set(running.outer)
        WRITING.set(None if running.outer is None else running.outer.writing)
        placement = running.placement
        if placement is None:
            return None
        if running.writing is not None and not running.writing.done:
            raise RuntimeError(
                f"The input embedding of {type(model).__name__} must write the thoughts, but was not run on the ids "
                "of this pass. If it was replaced after the adapter was attached, unload the adapter, replace it, and "
                "load it again; if not, the model adds to its ids before it looks them up, and cannot carry thoughts."
            )
        generation = RUNNING.get()
        if running.places and (generation is None or generation.model is not model):
            cache = find_cache(output)
            if cache is not None and not isinstance(cache, (Tensor, tuple, list)):
                remember(cache, placement, str(self.layer.active_name()), running.length)
        return self._in_line(output, running, placement)

    def _in_line(self, output: Any, running: Pass, placement: Placement) -> Any:
        """The outputs of a pass in the caller's rows and columns."""
        if running.repeats is not None:
            cache = find_cache(output)
            output = repeat_rows(
                self._in_line(output, replace(running, repeats=None), placement), running.repeats, len(placement.start)
            )
            cache.batch_select_indices(running.repeats)
            return output
        if running.divided is not None:
            return self.two_passes.end(output, running.divided)
        if not placement.inserted:
            return output
        start, num = placement.start, placement.num_thoughts
        if running.places:
            kept, last_rows = running.kept, running.last_rows
            return restore(output, start, num, running.length, kept, last_rows, placement.column)
        if isinstance(output, tuple):
            return restore_keys(output, start, num)
        if isinstance(output, dict) and output.get("attentions"):
            output["attentions"] = restore_keys(output["attentions"], start, num)
        return output

    def _whole_rows(self, inputs: dict[str, Any], reader: PromptReader) -> Pass:
        """Whole rows, outside of `generate`: find the thoughts' place, run the assistant, insert."""
        own = forward_inputs.pop_own(inputs)
        forward_inputs.check(inputs, own)
        placement = self.thinker.locate(inputs, reader)
        length = forward_inputs.tokens(inputs).shape[1]
        check_room(self.model, find_cache(inputs), inputs, length, placement.num_inserted)
        self._warn_unread(inputs, placement)
        if placement.late:
            forward_inputs.drop_early_labels(inputs, placement)
            self._warn_late()
        hidden = self.thinker.think(inputs.get("input_ids"), placement, reader, **own)
        divided = self._in_two_passes(reader, inputs, placement, hidden)
        return divided or self._in_one_pass(reader, inputs, placement, hidden)

    def _in_one_pass(self, reader: PromptReader, inputs: dict[str, Any], placement: Placement, hidden: Tensor) -> Pass:
        """Insert the thoughts into whole rows."""
        if placement.padded and self.takes_positions and inputs.get("position_ids") is None:
            inputs["position_ids"] = positions(inputs["attention_mask"])
        return self._place(inputs, placement, hidden, reader)

    def _in_two_passes(
        self, reader: PromptReader, inputs: dict[str, Any], placement: Placement, hidden: Tensor
    ) -> Pass | None:
        """Run the prompts of a training step, and go on with thoughts and responses; `None` where that cannot be."""
        if not (reader.config.two_pass_training and self.model.training and torch.is_grad_enabled()):
            return None
        if inputs.get("labels") is None:
            return None

        def in_one_pass(inputs: dict[str, Any], placement: Placement, hidden: Tensor) -> Any:
            running = self._in_one_pass(reader, inputs, placement, hidden)
            return self._in_line(self._run(inputs, running), running, placement)

        filler, trained = self.thinker.filler(reader), self.layer.softcot_projection
        rows = self.two_passes.begin(inputs, placement, hidden, filler, trained, in_one_pass)
        return None if rows is None else self._part_of(rows, hidden)

    def _part_of(self, rows: Rows | None, hidden: Tensor | None) -> Pass:
        """The first or, with the assistant's hidden states, the second pass of a training step."""
        if rows is None or hidden is None:
            return Pass(self.model, 0)
        if rows.head is not None and not self._leads_head:  # compilers cut their graphs at hooks: none before
            self._handles.append(self.two_passes.head.register_forward_pre_hook(self.before_head))
            self._leads_head = True
        writing = Writing(self.layer, hidden, rows.placement.start - rows.cut, rows.shape)
        return Pass(self.model, 0, rows.placement, writing, divided=rows)

    def _run_part(self, inputs: dict[str, Any], rows: Rows | None, hidden: Tensor | None) -> Any:
        return self._run(inputs, self._part_of(rows, hidden))

    def _run(self, inputs: dict[str, Any], running: Pass) -> Any:
        """Run the base's forward past the hooks: arguments and outputs are the base's own."""
        tokens = _PASS.set(running), WRITING.set(running.writing)
        try:
            return self.model.forward(**inputs)
        finally:
            _PASS.reset(tokens[0])
            WRITING.reset(tokens[1])

    def _warn_unread(self, inputs: dict[str, Any], placement: Placement) -> None:
        """Warn where no row of the logits but the last would read the thoughts."""
        labelled = inputs.get("labels") is not None or inputs.get("shift_labels") is not None
        keep = inputs.get("logits_to_keep")  # a number or a tensor of columns
        if placement.inserted and not labelled and not (isinstance(keep, int) and keep == 1):
            warnings.warn(
                "Without `labels`, thoughts stand after the last token of each row, and the logits of all rows before "
                "are the plain base's. If a response is among the tokens (a loss or log-likelihoods computed outside "
                "of the model, label smoothing), write a run of `thought_token` before it. If only the next token is "
                "wanted, pass `logits_to_keep=1`.",
                stacklevel=2,
            )

    def _warn_late(self) -> None:
        if not self._warned_late:
            self._warned_late = True
            warnings.warn(
                "Labels before the runs of `thought_token` (earlier turns of a conversation) are left out of the loss "
                "from here on, since no thoughts stand before them. To train on every turn, make one row of each with "
                "`softcot_peft.split_conversations`.",
                stacklevel=2,
            )

    def _place(
        self, inputs: dict[str, Any], placement: Placement, hidden: Tensor, reader: PromptReader, seen: int = 0
    ) -> Pass:
        """Insert the thought positions and say what is to be written."""
        batch, length = forward_inputs.tokens(inputs).shape[:2]
        thoughts = None if inputs.get("inputs_embeds") is None else self.layer.soft_thoughts(hidden)
        kept, last_rows = forward_inputs.place(inputs, placement, thoughts, self.thinker.filler(reader), seen)
        columns = seen + length + placement.num_inserted
        check_room(self.model, find_cache(inputs), inputs, columns)
        start, writing = placement.start - seen, None
        if thoughts is None:
            writing = Writing(self.layer, hidden, start, torch.Size((batch, length + placement.num_inserted)))
        here = placement.after(seen)
        return Pass(self.model, length, here, writing, places=True, kept=kept, last_rows=last_rows)

    def _generation_pass(
        self, generation: Generation, inputs: dict[str, Any], reader: PromptReader, cache: Any
    ) -> Pass:
        """A pass of `generate`: the prompts, a chunk of them, the next tokens, or all tokens again without a cache."""
        batch, length = forward_inputs.tokens(inputs).shape[:2]
        placement = generation.placement_of(batch)
        if generation.prefilled and cache_length(cache) > 0:
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
        source = generation.sources(batch)
        if seen == 0 and cache_length(cache) == 0 and generation.shares(inputs, cache):
            running = self._place(inputs, generation.distinct(inputs), generation.hidden, reader)
            return replace(running, repeats=source)
        return self._place(inputs, placement, generation.hidden[source], reader, seen)

    def _refuse_late_run(self, inputs: dict[str, Any], reader: PromptReader) -> None:
        """Refuse a run of thought tokens after a cache: the assistant would have to read the prompt before it."""
        ids, mask, token_id = inputs.get("input_ids"), inputs.get("attention_mask"), reader.thought_token_id
        if token_id is None or ids is None or ids.shape[1] == 1:  # single ones are padding of finished rows
            return
        found = ids == token_id
        if isinstance(mask, Tensor) and forward_inputs.is_padding_mask(mask):
            found = found & (mask[:, -ids.shape[1] :] != 0)
        if found.any():
            raise ValueError(
                f"`{CACHE_NAME}` must not stand before a run of `thought_token`: the assistant reads the whole "
                "prompt, which is not known any more. Pass the whole conversation in `input_ids`, without a cache."
            )

    def _next_tokens(self, inputs: dict[str, Any], placement: Placement | None, cache: Any) -> Pass:
        """Tokens after a cache that holds the thoughts."""
        if placement is None:
            raise RuntimeError("A pass after the prompt needs the prompt's placement.")
        forward_inputs.pop_own(inputs)
        length = forward_inputs.tokens(inputs).shape[1]
        forward_inputs.move_up(inputs, placement, cache, self.takes_positions)
        check_room(self.model, cache, inputs, cache_length(cache) + length)
        return Pass(self.model, length, placement)
