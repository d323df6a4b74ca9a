"""Determines whether a base can be trained in two passes: by known obstacles, else by a trial on the first batch."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from ..compat.caches import cache_length, can_crop, holds_attention_alone
from ..compat.engines import uncompiled
from ..compat.eval_mode import evaluating
from ..compat.in_float32 import in_float32
from ..rows.columns import take
from ..rows.divide import cuts_by_row, divide, predicted
from ..rows.facts import IGNORED
from ..rows.placement import Placement
from ..running import RUNNING
from ..sources import ThoughtSource
from .head_loss import cross_entropy
from .host import Host
from .interface import ROUNDING, InsertingPass, Pass, run_prompts
from .response import ResponsePass
from .two_pass_obstacles import CHECKPOINTING, SPLIT_ARGUMENTS, obstacle

_LOGGER = logging.getLogger(__name__)
_SCALE = 2.0**6  # exact in every dtype; the logits, in the hundreds, exceed every published soft cap


class TwoPassTrial:
    """The results of trying two passes on one base.

    Args:
        host: The host of the base.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.head = host.model.get_output_embeddings()
        self.head_is_last: bool | None = None  # `None`: not tried yet
        # Why two passes differ from one, or `None` if they agree; by whether rows are split at their own thoughts. The
        # key `None` stands for prompts of equal length.
        self._results: dict[bool | None, str | None] = {}
        self._can_crop = False
        self._logged: set[str] = set()
        self._hooked = False

    def allows(self, inputs: dict[str, Any], placement: Placement, states: Tensor, source: ThoughtSource) -> bool:
        """Return whether a training step can run in two passes; if not, log the reason once."""
        reason = obstacle(self.host, inputs, placement) or self._try_two_passes(inputs, placement, states, source)
        if reason is not None and reason not in self._logged:
            self._logged.add(reason)
            if reason == CHECKPOINTING:  # users can avoid it
                warnings.warn(CHECKPOINTING, stacklevel=2)
            else:
                _LOGGER.info("Training steps of %s run in one pass: %s.", type(self.host.model).__name__, reason)
        return reason is None

    def lets_share(self, inputs: dict[str, Any], placement: Placement, source: ThoughtSource) -> bool:
        """Return whether a source may read prompts into the cache of two passes.

        A batch like this one must have run in two passes before, with a cache that can be cropped.
        """
        known = self._results.get(self._own_splits(inputs, placement, source), "not tried yet") is None
        return known and self._can_crop and obstacle(self.host, inputs, placement) is None

    def _own_splits(self, inputs: dict[str, Any], placement: Placement, source: ThoughtSource) -> bool | None:
        if not placement.padded and placement.column is not None:
            return None
        return source.shares_cache or cuts_by_row(placement, inputs["input_ids"].shape[1])

    def replaces_head(self) -> bool:
        """Return whether a step may compute the loss in place of the base's head; hooks the head the first time.

        Head and loss must be the base's own, because trainers may replace them.
        """
        model = self.host.model
        own = model.get_output_embeddings() is self.head
        usual = own and getattr(model, "loss_function", None) is ForCausalLMLoss
        if not (self.head_is_last and usual):
            return False
        if not self._hooked:  # only now, because hooks break the graphs of compilers
            self.host.handles.append(self.head.register_forward_pre_hook(self.before_head))
            self._hooked = True
        return True

    @uncompiled
    def before_head(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Compute the loss of a training step in place of the head."""
        running = RUNNING.get()
        own = isinstance(running, Pass) and running.host is self.host
        loss = getattr(running, "head_loss", None) if own else None
        return None if loss is None else (loss.replace_head(args[0]), *args[1:])

    def _try_two_passes(
        self, inputs: dict[str, Any], placement: Placement, states: Tensor, source: ThoughtSource
    ) -> str | None:
        """Compare two passes with one; returns why they differ, `None` if they agree.

        With a cache, attention computes the same for parts of a row as for the whole row. Models that continue a
        recurrent state one token at a time, or count positions by column, do not, and no config tells. The trial runs
        the rows with the shortest and the longest prompt, once for each way of splitting prompts of different lengths.
        It runs in float32, because rounding in half precision would hide differences.
        """
        own_splits = self._own_splits(inputs, placement, source)
        if own_splits in self._results:
            return self._results[own_splits]
        pick = torch.stack([placement.start.argmin(), placement.start.argmax()])
        batch = {name: inputs[name][pick] for name in SPLIT_ARGUMENTS if inputs.get(name) is not None}
        if (batch["labels"][:, 1:] == IGNORED).all():
            return "the rows that would be tried have no labels"
        try:
            with torch.no_grad(), evaluating(self.host.model):
                if self.head_is_last is None:
                    self.head_is_last = self._try_head(batch["input_ids"], source)
                with in_float32(self.host.model):
                    agrees = self._agree(batch, placement.select(pick), states[pick], source)
            self._results[own_splits] = (
                None if agrees else "its logits after a cached prompt are not those of whole rows"
            )
        except Exception as error:  # models not written for this may fail in any way
            if should_reduce_batch_size(error):  # out of memory: no result for the model
                return f"memory ran out when two passes were tried ({error})"
            self._results[own_splits] = f"it cannot continue from a cached prompt ({error})"
        return self._results[own_splits]

    def _try_head(self, ids: Tensor, source: ThoughtSource) -> bool:
        """Return whether the head's output is the base's logits, bit for bit: nothing follows the head.

        The input of the head is scaled up, because small logits may pass a soft cap unchanged.
        """
        seen: list[Tensor] = []

        def scale_up(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not args:
                return None
            seen.append(args[0] * _SCALE)
            return (seen[-1], *args[1:])

        handle = self.head.register_forward_pre_hook(scale_up)
        try:
            inputs = {"input_ids": ids, "labels": ids, "use_cache": False, "return_dict": True}
            output = Pass(self.host, source).run(inputs)
        finally:
            handle.remove()
        if len(seen) != 1 or output.get("logits") is None or output.get("loss") is None:
            return False
        predicts, targets = predicted(ids)
        logits = self.head(seen[0])
        loss = cross_entropy(self.head, seen[0].flatten(0, 1)[predicts], targets, logits.shape[-1]) / len(targets)
        same = logits.shape == output.logits.shape and bool((logits == output.logits).all())
        return same and bool(torch.isclose(loss, output.loss.float(), rtol=1e-4))

    def _agree(self, inputs: dict[str, Any], placement: Placement, states: Tensor, source: ThoughtSource) -> bool:
        """Return whether logits and loss of two passes equal those of one, up to rounding."""
        host = self.host
        inputs["return_dict"] = True
        rest = dict(inputs)
        rows = divide(inputs, placement, host.filler(source), host.takes_positions, source.shares_cache)
        cache = run_prompts(host, source, rows.prompt)
        if not holds_attention_alone(cache) or cache_length(cache) != rows.prompt["input_ids"].shape[1]:
            return False
        self._can_crop = can_crop(cache)
        response = ResponsePass(host, source, rows, states)
        response.begin_after(rest, cache, replaces_head=False)
        output = response.run(rest)
        whole = InsertingPass(host, source)
        whole.insert_whole(inputs, placement, states)
        expected = whole.finish(whole.run(inputs))
        index, included = rows.columns_of(rows.length)
        index = index - (rows.shape[1] - output.logits.shape[1])  # columns that predict nothing may be omitted
        compared = included & (index < output.logits.shape[1])
        if placement.attention_mask is not None:
            compared = compared & placement.attention_mask.bool()
        two = take(output.logits, index.clamp(0, output.logits.shape[1] - 1))
        pairs = (expected.loss, output.loss), (expected.logits[compared], two[compared])
        return all(bool((one - two).float().norm() <= ROUNDING * one.float().norm()) for one, two in pairs)
