"""Places thoughts on the base model itself, so that every route to it is the same function.

A forward pre-hook turns the caller's inputs into what the base sees (`placement`), runs the assistant and hands the soft
thoughts to the embedding layer; a forward hook puts the outputs back in line with the caller's tokens. `generate` works
in the caller's coordinates throughout: it computes the thoughts once, and the same two hooks translate each of its
forward passes. So everything that `generate` does with ids (penalties, bans, stop strings, streamers, lengths, drafts)
never meets a thought position.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ._compat import PACKED_NAMES, accepts, argument_names, cache_length, find_cache, position_limit
from .layer import WRITING, SoftCoTLayer, Writing, write_thoughts
from .placement import (
    IGNORED,
    Placement,
    align_left,
    check_unpacked,
    insert,
    insert_positions,
    locate,
    positions,
    prompts,
    restore,
    restore_keys,
    trailing,
)

OWN_INPUTS = ("assistant_input_ids", "assistant_attention_mask")
_RECORD = "softcot_placement"  # attribute of a cache that holds thought positions


@dataclass
class Generation:
    """A running `generate` call of a base.

    Args:
        model: The base.
        placement: Where the thoughts stand, in the left-aligned prompts.
        thoughts: `(B, N, H_base)`.
        length: Columns of the prompts.
        consumed: Prompt columns that the base has read so far; fewer than `length` during chunked prefill.
    """

    model: nn.Module
    placement: Placement
    thoughts: Tensor
    length: int
    consumed: int = 0


@dataclass(frozen=True)
class Pass:
    """A running forward pass, from the pre-hook to the forward hook.

    Args:
        model: The base.
        placement: Where the thoughts stand; `None` while a prompt is prefilled up to them.
        length: The caller's columns in this pass.
        writes: Whether the thoughts are written in this pass, or are in the cache already.
        kept: The caller's columns whose logits were asked for, when both of their placed rows were requested.
        last_row: Whether only the last row of logits was asked for.
        writing: What the embedding layer was doing before, restored afterwards.
        outer: The pass that was running before, restored afterwards.
    """

    model: nn.Module
    placement: Placement | None
    length: int
    writes: bool
    kept: Tensor | None
    last_row: bool
    writing: Writing | None
    outer: Pass | None


_PASS: ContextVar[Pass | None] = ContextVar("softcot_pass", default=None)
_GENERATION: ContextVar[Generation | None] = ContextVar("softcot_generation", default=None)


class ThoughtHooks:
    """The hooks and the `generate` of one base, installed once and shared by all of its SoftCoT adapters.

    Args:
        model: The base.
        layer: Its wrapped input embedding.
    """

    def __init__(self, model: PreTrainedModel, layer: SoftCoTLayer) -> None:
        self.model = model
        self.layer = layer
        self.names = argument_names(model)
        self.takes_positions = accepts(type(model).forward, "position_ids")
        self._replaced: dict[str, Any] = {}
        self._handles = [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            model.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True),
        ]
        if hasattr(model, "generate"):
            self._replace("generate", self.generate)
            self._replace("_prepare_cache_for_generation", self._prepare_cache)

    def _replace(self, name: str, method: Callable[..., Any]) -> None:
        """Put a method on the model instance, keeping what was there."""
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

    # forward

    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Turn the caller's inputs into what the base sees. Does nothing when adapters are disabled."""
        reader = self.layer.active_reader()
        if reader is None:
            if any(name in kwargs for name in OWN_INPUTS):
                return args, {name: value for name, value in kwargs.items() if name not in OWN_INPUTS}
            return None
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        generation = _GENERATION.get()
        cache = find_cache(inputs)
        record = getattr(cache, _RECORD, None)
        if generation is not None and generation.model is model:
            running, writing = self._generation_pass(generation, inputs, cache)
        elif cache_length(cache) > 0:
            if record is None:
                raise ValueError(
                    "`past_key_values` holds tokens that were read without thoughts. Start from an empty cache, with the "
                    "whole prompt in `input_ids`, or disable the adapter."
                )
            running, writing = self._decode(inputs, record, cache), WRITING.get()
        else:
            running, writing = self._whole_pass(inputs)
        WRITING.set(writing)
        _PASS.set(running)
        return (), inputs

    def after_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Put the outputs back in line with the caller's tokens; called also when the forward raised."""
        running = _PASS.get()
        if running is None or running.model is not model:
            return None
        _PASS.set(running.outer)
        WRITING.set(running.writing)
        placement = running.placement
        if output is None or placement is None:
            return None
        generation = _GENERATION.get()
        if generation is None and running.writes and isinstance(output, dict):
            cache = find_cache(output)
            if cache is not None and not isinstance(cache, (tuple, list, Tensor)):
                setattr(cache, _RECORD, replace(placement, start=placement.start.detach()))
        if not placement.inserted:
            return None
        if not running.writes:
            attentions = output.get("attentions") if isinstance(output, dict) else None
            if attentions:
                output["attentions"] = restore_keys(attentions, placement)
            return output
        return restore(output, placement, running.length, running.kept, running.last_row)

    def _whole_pass(self, inputs: dict[str, Any]) -> tuple[Pass, Writing | None]:
        """A forward pass over whole rows: find the thoughts' place, run the assistant, insert."""
        own = {name: inputs.pop(name, None) for name in OWN_INPUTS}
        reference = self._reference(inputs)
        mask, labels = inputs.get("attention_mask"), inputs.get("labels")
        self._check_whole(inputs, own)
        if mask is None and inputs.get("input_ids") is None:
            mask = torch.ones(reference.shape[:2], dtype=torch.long, device=reference.device)
        placement = self._locate(inputs, labels, mask, reference)
        thoughts = self.think(inputs.get("input_ids"), placement, **own)
        if placement.padded and self.takes_positions and inputs.get("position_ids") is None and mask is not None:
            inputs["position_ids"] = positions(mask)
        return self._place(inputs, placement, thoughts)

    def _locate(
        self, inputs: dict[str, Any], labels: Tensor | None, mask: Tensor | None, reference: Tensor
    ) -> Placement:
        """`locate` with the active adapter's config, and the base's position limit checked."""
        reader = self.layer.active_reader()
        assert reader is not None  # the caller asked
        config = reader.config
        num = config.num_thought_tokens
        if not self.model.training and config.inference_num_thought_tokens is not None:
            num = config.inference_num_thought_tokens
        placement = locate(
            inputs.get("input_ids"), mask, labels, num, reader.thought_token_id, config.placement == "thought_token"
        )
        if labels is None and placement.inserted and self.model.training and inputs.get("shift_labels") is None:
            warnings.warn(
                "In training mode thoughts are placed before the first label, but `labels` were not given, so they stand "
                "after the last token of each row and no response reads them. If the loss is computed outside of the "
                "model (label smoothing, `compute_loss_func`), write a run of `thought_token` into the prompts.",
                stacklevel=2,
            )
        limit = position_limit(self.model.config)
        if limit is not None and reference.shape[1] + placement.num_inserted > limit:
            longest = reference.shape[1] if mask is None else int(mask.sum(1).max())
            if longest + placement.num_inserted > limit:
                raise ValueError(
                    f"Tokens and thoughts must fit into the base's {limit} positions, got {longest} + "
                    f"{placement.num_inserted}. Shorten the input, or lower `num_thought_tokens` or "
                    "`inference_num_thought_tokens`."
                )
        return placement

    def _check_whole(self, inputs: dict[str, Any], own: dict[str, Tensor | None]) -> None:
        """Refuse inputs of a whole forward pass that cannot carry thoughts."""
        if inputs.get("input_ids") is None and own["assistant_input_ids"] is None:
            raise ValueError(
                "`inputs_embeds` alone do not tell the assistant the prompt. Pass `input_ids`, or pass "
                "`assistant_input_ids` (and `assistant_attention_mask`) ending in the thought positions as well."
            )
        packed = [name for name in PACKED_NAMES if inputs.get(name) is not None]
        if packed:
            raise ValueError(
                f"`{packed[0]}` announces a packed or padding-free batch, which cannot carry thoughts, since a row has "
                "one place for them. Turn `packing`, `padding_free` and continuous batching off."
            )
        mask = inputs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            found = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"`attention_mask` must be the padding mask (batch, tokens), got {found}: thoughts cannot be placed under "
                "a ready-made mask."
            )
        check_unpacked(inputs.get("position_ids"), mask)

    def think(
        self,
        input_ids: Tensor | None,
        placement: Placement,
        assistant_input_ids: Tensor | None = None,
        assistant_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Run the assistant once and project: `s = W Assistant([prompt; thought token x N]) + b`.

        Args:
            input_ids: The caller's ids `(B, L)`; may be `None` with `assistant_input_ids`.
            placement: Where the thoughts stand; the assistant sees nothing beyond.
            assistant_input_ids: The caller's own assistant input `(B, P)`, ending in N thought positions.
            assistant_attention_mask: Its mask `(B, P)`; `None`: all attended.

        Returns:
            `(B, N, H_base)` in the projection's dtype.

        Raises:
            ValueError: The caller's assistant input does not fit the batch or N.
        """
        reader = self.layer.active_reader()
        assert reader is not None  # the caller asked
        num = placement.num_thoughts
        if assistant_input_ids is not None:
            batch = placement.start.shape[0]
            if (
                assistant_input_ids.dim() != 2
                or assistant_input_ids.shape[0] != batch
                or assistant_input_ids.shape[1] < num
            ):
                raise ValueError(
                    f"`assistant_input_ids` must have {batch} rows and end in {num} thought positions, got the shape "
                    f"{tuple(assistant_input_ids.shape)}. Make one row per prompt, padded on the left."
                )
            mask = assistant_attention_mask
            ids = assistant_input_ids
            mask = torch.ones_like(ids) if mask is None else mask
        elif input_ids is not None:
            ids, mask = reader.read(*prompts(input_ids, placement), num)
        else:
            raise ValueError("`input_ids` or `assistant_input_ids` must be given.")
        hidden = reader.assistant.hidden_states(ids, mask, num, self.layer.weight.device)
        return self.layer.soft_thoughts(hidden)

    def _place(
        self, inputs: dict[str, Any], placement: Placement, thoughts: Tensor, seen: int = 0
    ) -> tuple[Pass, Writing | None]:
        """Make room for the thoughts in the inputs, in place of the dict, and say what is to be written.

        Args:
            inputs: The forward's arguments by name.
            placement: Where the thoughts stand in the rows.
            thoughts: `(B, N, H_base)`.
            seen: The rows' columns that earlier passes have read (chunked prefill).
        """
        batch, length = self._reference(inputs).shape[:2]
        here = replace(placement, start=placement.start - seen, latest=placement.latest - seen)
        kept, last_row = None, False
        if placement.inserted:
            kept, last_row = self._keep_logits(inputs, here, length)
            mask = inputs.pop("attention_mask", None)
            self._insert(inputs, here, thoughts)
            if mask is not None:
                inputs["attention_mask"] = self._placed_mask(mask, placement, seen + length)
        elif inputs.get("inputs_embeds") is not None:
            inputs["inputs_embeds"] = write_thoughts(inputs["inputs_embeds"], thoughts, here.start)
        writing = WRITING.get()
        if inputs.get("inputs_embeds") is None:
            writing = Writing(self.layer, thoughts, here.start, torch.Size((batch, length + placement.num_inserted)))
        return self._pass(here, length, True, kept, last_row), writing

    def _insert(self, inputs: dict[str, Any], placement: Placement, thoughts: Tensor) -> None:
        """Insert the thought positions into every per-token input but the mask."""
        start, num = placement.start, placement.num_thoughts
        shape = self._reference(inputs).shape[:2]
        fills = {"input_ids": self._filler(), "labels": IGNORED}
        for name, value in list(inputs.items()):
            if not isinstance(value, Tensor) or value.dim() < 2:
                continue
            if name == "position_ids":
                inputs[name] = insert_positions(value, start, num)
            elif name == "inputs_embeds":
                inputs[name] = insert(value, start, num, thoughts.to(value))
            elif name == "shift_labels":  # already shifted: the last thought's row predicts the first label
                inputs[name] = insert(value, start - 1, num, IGNORED)
            elif name in fills or name.endswith("token_type_ids"):
                inputs[name] = insert(value, start, num, fills.get(name, 0))
            elif value.shape[:2] == shape:
                raise ValueError(
                    f"`{name}` has one value per token, and it is not known what a thought position's value is. Leave it "
                    "out, or write a run of `thought_token` into the prompts so that every position is yours."
                )
        cache_position = inputs.get("cache_position")  # transformers before 5 passes it
        if cache_position is not None:
            more = torch.arange(1, num + 1, device=cache_position.device) + cache_position[-1]
            inputs["cache_position"] = torch.cat([cache_position, more])

    @staticmethod
    def _placed_mask(mask: Any, placement: Placement, length: int) -> Tensor:
        """The mask `(B, length + N)` that the base sees.

        Args:
            mask: The caller's mask `(B, length)`. Anything else, such as the ready-made masks that `generate` computes
                for caches of a fixed size, is replaced: the prompts' mask and attended tokens after it.
            placement: Where the thoughts stand.
            length: The caller's columns so far.
        """
        num = placement.num_thoughts
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            start, mask = placement.start, placement.attention_mask
            prompt = torch.ones(len(start), 0, dtype=torch.long, device=start.device) if mask is None else mask
            mask = torch.cat([prompt, prompt.new_ones(len(start), length - prompt.shape[1])], dim=1)
        return insert(mask, placement.start, num, 1)

    def _keep_logits(self, inputs: dict[str, Any], placement: Placement, length: int) -> tuple[Tensor | None, bool]:
        """Translate `logits_to_keep`; returns the caller's columns asked for, and whether it is the last row alone."""
        keep = inputs.get("logits_to_keep")
        if keep is None or (isinstance(keep, int) and (keep == 0 or keep >= length)):
            if keep:
                inputs["logits_to_keep"] = 0
            return None, False
        if isinstance(keep, int):
            if length - keep >= placement.latest - 1:  # every row asked for moved up by N: still the last ones
                return None, True
            keep = torch.arange(length - keep, length, device=placement.start.device)
        # A column's row is itself before the thoughts and N further after them; rows may differ, so both are computed.
        inputs["logits_to_keep"] = torch.cat([keep, keep + placement.num_thoughts])
        return keep, False

    def _filler(self) -> int:
        """An ordinary id for thought positions, read only by models that look at ids beside the embeddings."""
        reader = self.layer.active_reader()
        if reader is not None and reader.thought_token_id is not None:
            return reader.thought_token_id
        config = self.model.config.get_text_config(decoder=True)
        for token_id in (config.bos_token_id, config.eos_token_id):
            if isinstance(token_id, int) and token_id != config.pad_token_id:
                return token_id
        return 0

    def _pass(
        self,
        placement: Placement | None,
        length: int,
        writes: bool,
        kept: Tensor | None = None,
        last_row: bool = False,
    ) -> Pass:
        return Pass(self.model, placement, length, writes, kept, last_row, WRITING.get(), _PASS.get())

    @staticmethod
    def _reference(inputs: dict[str, Any]) -> Tensor:
        """The tensor that says how many rows and columns a pass has."""
        for name in ("input_ids", "inputs_embeds"):
            if isinstance(inputs.get(name), Tensor):
                found: Tensor = inputs[name]
                return found
        raise ValueError("`input_ids` must be given, got none.")

    # generate

    def _generation_pass(
        self, generation: Generation, inputs: dict[str, Any], cache: Any
    ) -> tuple[Pass, Writing | None]:
        """A forward pass of `generate`: the prompt, a chunk of it, the whole text again, or the next tokens."""
        reference = self._reference(inputs)
        batch, length = reference.shape[:2]
        placement = generation.placement.expand(batch)
        prefilled = generation.consumed >= generation.length
        if prefilled and cache is not None:
            return self._decode(inputs, placement, cache), WRITING.get()
        seen = generation.consumed if not prefilled else 0
        generation.consumed = seen + length
        if seen + length < generation.length:
            if prefilled:
                raise RuntimeError(
                    f"`generate` passed {length} tokens of {generation.length} or more and no cache that holds the rest, so "
                    f"{type(self.model).__name__} cannot carry thoughts while decoding. Report it, with the class."
                )
            if placement.inserted:  # a chunk of the prompt; the thoughts come after its last one
                return self._pass(None, length, False), WRITING.get()
        thoughts = generation.thoughts
        thoughts = thoughts.repeat_interleave(batch // thoughts.shape[0], dim=0)
        return self._place(inputs, placement, thoughts, seen)

    def _decode(self, inputs: dict[str, Any], placement: Placement, cache: Any) -> Pass:
        """The next tokens after a cache that holds the thoughts: move positions and mask up."""
        for name in OWN_INPUTS:
            inputs.pop(name, None)
        batch, length = self._reference(inputs).shape[:2]
        placement = placement.expand(batch)
        mask = inputs.get("attention_mask")
        if placement.inserted:
            if placement.padded or (isinstance(mask, Tensor) and mask.dim() == 2):
                so_far = cache_length(cache) - placement.num_thoughts + length
                inputs["attention_mask"] = self._placed_mask(mask, placement, so_far)
            for name in ("position_ids", "cache_position"):
                if isinstance(inputs.get(name), Tensor):
                    inputs[name] = inputs[name] + placement.num_thoughts
        mask = inputs.get("attention_mask")
        if placement.padded and self.takes_positions and inputs.get("position_ids") is None and mask is not None:
            inputs["position_ids"] = positions(mask)[:, -length:]
        return self._pass(placement, length, False)

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`generate` with thoughts: one assistant pass per prompt, and the caller's tokens back.

        Right-padded prompts are aligned to the left first, since new tokens continue the last column; the result shows
        the caller's prompts as they were.

        Args:
            original: The base's own `generate`.
            *args: As it takes them.
            **kwargs: As it takes them, and `assistant_input_ids` and `assistant_attention_mask`.

        Raises:
            ValueError: The prompts cannot carry thoughts, or an option would run the base without them.
        """
        own = {name: kwargs.pop(name, None) for name in OWN_INPUTS}
        if self.layer.active_reader() is None:
            return original(*args, **kwargs)
        bound = inspect.signature(original).bind(*args, **kwargs)
        arguments = {**bound.arguments.pop("kwargs", {}), **bound.arguments}
        self._check_generate(arguments)
        ids = arguments.pop("inputs", None)
        if ids is not None and arguments.get("input_ids") is None:
            arguments["input_ids"] = ids
        self._check_whole(arguments, own)
        reference = self._reference(arguments)
        mask = arguments.get("attention_mask")
        if mask is None:
            mask = self._infer_mask(arguments)
        placement = self._locate(arguments, None, mask, reference)
        with torch.no_grad():
            thoughts = self.think(arguments.get("input_ids"), placement, **own)

        length = reference.shape[1]
        aligned = placement.padded and bool((mask[:, -1] == 0).any())
        prompt = arguments.get("input_ids")
        if aligned:
            start = placement.start + trailing(mask)
            for name in ("input_ids", "inputs_embeds", "position_ids"):
                if isinstance(arguments.get(name), Tensor) and arguments[name].shape[:2] == mask.shape:
                    arguments[name] = align_left(arguments[name], mask)
            mask = align_left(mask, mask)
            placement = replace(placement, start=start, attention_mask=mask, latest=int(start.max()))
        arguments["attention_mask"] = mask
        token = _GENERATION.set(Generation(self.model, placement, thoughts, length))
        try:
            result = original(**arguments)
        finally:
            _GENERATION.reset(token)
        if aligned and prompt is not None:
            sequences = result if isinstance(result, Tensor) else result.sequences
            sequences[:, :length] = prompt.repeat_interleave(sequences.shape[0] // prompt.shape[0], dim=0)
        return result

    def _check_generate(self, arguments: dict[str, Any]) -> None:
        """Refuse options of `generate` under which the base would run without its thoughts."""

        def option(name: str) -> Any:
            if arguments.get(name) is not None:
                return arguments[name]
            for config in (arguments.get("generation_config"), self.model.generation_config):
                if getattr(config, name, None) is not None:
                    return getattr(config, name)
            return None

        if cache_length(find_cache(arguments)) > 0:
            raise ValueError(
                "`past_key_values` must be empty: thoughts belong to the end of the whole prompt, so a second turn cannot "
                "continue an old cache. Pass the whole conversation in `input_ids`."
            )
        refused = {
            "guidance_scale": option("guidance_scale") not in (None, 1, 1.0),
            "token_healing": bool(option("token_healing")),
            "assistant_early_exit": option("assistant_early_exit") is not None,
            "cache_implementation": option("cache_implementation") == "paged",
        }
        for name, found in refused.items():
            if found:
                raise ValueError(
                    f"`{name}={option(name)!r}` runs the base in a way that cannot carry thoughts. Leave it out, or "
                    "disable the adapter."
                )

    def _infer_mask(self, arguments: dict[str, Any]) -> Tensor:
        """The mask that transformers' `generate` infers from the pad token where the caller gives none."""
        ids = arguments.get("input_ids")
        if ids is None:
            reference = self._reference(arguments)
            return torch.ones(reference.shape[:2], dtype=torch.long, device=reference.device)
        sources = [arguments, arguments.get("generation_config"), self.model.generation_config]

        def token(name: str) -> Any:
            for source in sources:
                value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
                if value is not None:
                    return value
            return None

        pad, eos = token("pad_token_id"), token("eos_token_id")
        if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
            return torch.ones_like(ids)
        return (ids != pad).long()

    def _prepare_cache(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make room for the thoughts in caches of a fixed size.

        `_prepare_cache_for_generation` is private in transformers, and the only place where such a cache gets its length
        from the caller's `max_length` (5.23).
        """
        generation = _GENERATION.get()
        bound = inspect.signature(original).bind(*args, **kwargs)
        if generation is not None and generation.model is self.model:
            bound.arguments["max_cache_length"] += generation.placement.num_inserted
        return original(*bound.args, **bound.kwargs)
