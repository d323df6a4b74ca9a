"""Whether a base can be trained in two passes: told by its state where that says so, else found by trying once."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from ..compat.caches import cache_length, holds_attention_alone
from ..compat.engines import uncompiled
from ..compat.eval_mode import evaluating
from ..compat.in_float32 import in_float32
from ..embedding import RUNNING
from ..rows.columns import take
from ..rows.divide import cuts_by_row, divide, predicted
from ..rows.facts import IGNORED
from ..rows.placement import Placement
from ..sources import ThoughtSource
from .head_loss import cross_entropy
from .host import Host
from .interface import InsertingPass, Pass
from .response import ResponsePass, run_prompts
from .two_pass_obstacles import CHECKPOINTING, TRIED, obstacle

_LOGGER = logging.getLogger(__name__)
_ROUNDING = 1e-3  # relative; TF32 rounds as coarsely as float16
_LOUD = 2.0**6  # exact in every dtype; logits of some hundreds are beyond every published cap


class TwoPassTrial:
    """What was found out about two passes through one base.

    Args:
        host: The base.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.head = host.model.get_output_embeddings()
        self.head_is_last: bool | None = None  # not tried yet
        # Why two passes are not as one, if so; by whether rows of unequal prompts are cut at their own thoughts, None:
        # equal prompts.
        self._found: dict[bool | None, str | None] = {}
        self._said: set[str] = set()
        self._hooked = False

    def allows(self, inputs: dict[str, Any], placement: Placement, states: Tensor, source: ThoughtSource) -> bool:
        """Whether a training step can be divided; if not, the reason is logged once."""
        reason = obstacle(self.host, inputs, placement) or self._tried(inputs, placement, states, source)
        if reason is not None and reason not in self._said:
            self._said.add(reason)
            if reason == CHECKPOINTING:  # its cost is a user's to weigh
                warnings.warn(CHECKPOINTING, stacklevel=2)
            else:
                _LOGGER.info("Training steps of %s run in one pass: %s.", type(self.host.model).__name__, reason)
        return reason is None

    def replaces_head(self) -> bool:
        """Whether a step may compute the loss in the place of the base's head; hooks the head the first time.

        Head and loss have to be those that the base came with: a trainer may have put others in their place.
        """
        model = self.host.model
        own = model.get_output_embeddings() is self.head
        usual = own and getattr(model, "loss_function", None) is ForCausalLMLoss
        if not (self.head_is_last and usual):
            return False
        if not self._hooked:  # compilers cut their graphs at hooks: none before
            self.host.handles.append(self.head.register_forward_pre_hook(self.before_head))
            self._hooked = True
        return True

    @uncompiled
    def before_head(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Have the loss of a training step computed in the place of the head."""
        running = RUNNING.get()
        own = isinstance(running, Pass) and running.host is self.host
        loss = getattr(running, "head_loss", None) if own else None
        return None if loss is None else (loss.stand_in(args[0]), *args[1:])

    def _tried(
        self, inputs: dict[str, Any], placement: Placement, states: Tensor, source: ThoughtSource
    ) -> str | None:
        """Why two passes are not as one, found by trying; `None` where they are.

        Attention with a cache reads a row in pieces as it reads it whole. A model that goes on from a recurrent state
        with one token at a time, or counts positions by column, does not, and nothing in a config tells. So it is
        tried once, on the rows with the shortest and the longest prompt, and once more for each way of dividing
        prompts that differ in length. In half precision, rounding would hide differences: the trial computes in
        float32.
        """
        way = None
        if placement.padded or placement.column is None:
            way = cuts_by_row(placement, inputs["input_ids"].shape[1])
        if way in self._found:
            return self._found[way]
        pick = torch.stack([placement.start.argmin(), placement.start.argmax()])
        few = {name: inputs[name][pick] for name in TRIED if inputs.get(name) is not None}
        if (few["labels"][:, 1:] == IGNORED).all():
            return "the rows that would be tried have no labels"
        try:
            with torch.no_grad(), evaluating(self.host.model):
                if self.head_is_last is None:
                    self.head_is_last = self._try_head(few["input_ids"], source)
                with in_float32(self.host.model):
                    agrees = self._agree(few, placement.select(pick), states[pick], source)
            self._found[way] = None if agrees else "its logits after a cached prompt are not those of whole rows"
        except Exception as error:  # models fail in their own ways where they were never run so
            if should_reduce_batch_size(error):  # out of memory, which says nothing about the model
                return f"memory ran out when two passes were tried ({error})"
            self._found[way] = f"it cannot go on from a cached prompt ({error})"
        return self._found[way]

    def _try_head(self, ids: Tensor, source: ThoughtSource) -> bool:
        """Whether the head is the last thing that the base runs, so that its logits are the model's to the bit.

        What the head reads is made larger, so that a cap on the logits that a small number passes unchanged is seen.
        """
        seen: list[Tensor] = []

        def enlarge(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not args:
                return None
            seen.append(args[0] * _LOUD)
            return (seen[-1], *args[1:])

        handle = self.head.register_forward_pre_hook(enlarge)
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
        """Whether logits and loss of two passes are those of one, but for rounding."""
        host = self.host
        inputs["return_dict"] = True
        rows, rest = divide(inputs, placement, host.filler(source), host.takes_positions), dict(inputs)
        cache = run_prompts(host, source, rows)
        if not holds_attention_alone(cache) or cache_length(cache) != rows.prompt["input_ids"].shape[1]:
            return False
        response = ResponsePass(host, source, rows, states)
        response.begin_after(rest, cache, replaces_head=False)
        found = response.run(rest)
        whole = InsertingPass(host, source)
        whole.insert_whole(inputs, placement, states)
        expected = whole.finish(whole.run(inputs))
        index, late = rows.index_of(rows.length)
        index = index - (rows.shape[1] - found.logits.shape[1])  # columns that predict nothing may be left out
        read = late & (index < found.logits.shape[1])
        if placement.attention_mask is not None:
            read = read & placement.attention_mask.bool()
        two = take(found.logits, index.clamp(0, found.logits.shape[1] - 1))
        pairs = (expected.loss, found.loss), (expected.logits[read], two[read])
        return all(bool((one - two).float().norm() <= _ROUNDING * one.float().norm()) for one, two in pairs)
