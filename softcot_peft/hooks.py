"""Hooks on the base itself, so that all ways to run it compute the same function. They choose the kind of pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .compat.caches import cache_length, find_cache
from .compat.engines import uncompiled
from .embedding import SoftCoTLayer
from .guards import WrappedMethod, backbones, guard, reject_backbone
from .passes.cache_record import recall
from .passes.decoding import Decoding
from .passes.generate import generate, prepare_cache
from .passes.generation import running_generation
from .passes.host import Host
from .passes.interface import Pass
from .passes.prefill import Prefill
from .passes.shared_prompt import PromptSharing
from .passes.two_pass import TwoPassTraining
from .passes.two_pass_trial import TwoPassTrial
from .passes.whole import WholeRows
from .publishing import CARD, UPLOAD, BareCard, upload
from .rows.arguments import keep_columns, pop_own, tokens
from .running import READING, RUNNING
from .sources import ThoughtSource


class ThoughtHooks:
    """The hooks and the wrapped `generate` of one base. Installed once, shared by all of its SoftCoT adapters.

    Compilers run the hooks eagerly, because the hooks read each prompt only once and keep their state per thread.

    Args:
        model: The base.
        layer: Its wrapped input embedding.
        loading: Wraps transformers' loading of weights.
    """

    def __init__(self, model: PreTrainedModel, layer: SoftCoTLayer, loading: Callable[..., Any]) -> None:
        self.model = model
        self.host = Host(model, layer)
        self.trial = TwoPassTrial(self.host)
        self.sharing = PromptSharing(self.host)
        self.host.handles += [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            model.register_forward_hook(self.after_forward, with_kwargs=True),
            *(backbone.register_forward_pre_hook(self.before_backbone) for backbone in backbones(model, layer)),
        ]
        self._wrapped_methods = [*guard(model, layer), WrappedMethod(model, "_load_pretrained_model", loading)]
        if hasattr(model, UPLOAD):
            self._wrapped_methods.append(WrappedMethod(model, UPLOAD, upload))
        model.__dict__[CARD] = BareCard()
        if hasattr(model, "generate"):
            self._wrapped_methods.append(WrappedMethod(model, "generate", functools.partial(generate, self.host)))
            self._wrapped_methods.append(WrappedMethod(model, "_prepare_cache_for_generation", prepare_cache))
        # `Module.__call__` looks this up on the instance. It is private in torch (2.6 to 2.13), but nothing else
        # encloses hooks and forward: a KeyboardInterrupt skips even hooks registered with `always_call`.
        model.__dict__["_call_impl"] = self._call_impl

    def remove(self) -> None:
        """Remove the hooks and wrapped methods from the model."""
        for handle in self.host.handles:
            handle.remove()
        for method in reversed(self._wrapped_methods):
            method.remove()
        del self.model.__dict__["_call_impl"]
        self.model.__dict__.pop(CARD, None)

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, and restore the outer pass if anything is raised."""
        call = functools.partial(nn.Module._call_impl, self.model)
        if torch.compiler.is_compiling():
            return call(*args, **kwargs)
        outer = RUNNING.get()
        try:
            return call(*args, **kwargs)
        except BaseException:
            RUNNING.set(outer)
            raise

    @uncompiled
    def before_backbone(self, backbone: nn.Module, args: Any) -> None:
        """Reject direct calls of the backbone, which would run without thoughts."""
        running = RUNNING.get()
        inside = running is READING or (isinstance(running, Pass) and running.host is self.host)
        if not inside and self.host.layer.active_name() is not None:
            reject_backbone(self.model, backbone)

    @uncompiled
    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Translate the caller's inputs into the base's; changes no result while adapters are disabled."""
        source = self.host.layer.active_source()
        inputs = {**dict(zip(self.host.names, args, strict=False)), **kwargs} if args else kwargs.copy()
        if source is None:
            cache = find_cache(inputs)
            if cache is not None:
                recall(cache, None, inputs)
            pop_own(kwargs)
            keep_columns(kwargs)
            return args, kwargs
        running = self._choose(inputs, source)
        running.begin(inputs)
        running.outer = RUNNING.get()
        RUNNING.set(running)
        return (), inputs

    def _choose(self, inputs: dict[str, Any], source: ThoughtSource) -> Pass:
        """Choose the kind of pass for a forward."""
        host, generation, after_cache = self.host, running_generation(self.model), cache_length(find_cache(inputs)) > 0
        if generation is not None and generation.prefilled and after_cache:
            return Decoding(host, source, generation.placement_of(len(tokens(inputs))))
        if generation is not None:
            return Prefill(host, source, generation, self.sharing)
        if after_cache:
            return Decoding(host, source)
        trains = self.model.training and torch.is_grad_enabled() and inputs.get("labels") is not None
        if trains and source.config.two_pass_training:
            return TwoPassTraining(host, source, self.trial)
        return WholeRows(host, source)

    @uncompiled
    def after_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Align the outputs with the caller's tokens."""
        running = RUNNING.get()
        if not isinstance(running, Pass) or running.host is not self.host:
            return None
        RUNNING.set(running.outer)
        return running.finish(output)
