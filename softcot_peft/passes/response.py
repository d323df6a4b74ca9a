"""The second pass of two-pass training: thoughts and responses, after a KV cache of the prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compat.caches import CACHE_NAME, CACHE_NAMES
from ..embedding import Writing
from ..rows.arguments import PER_TOKEN_OUTPUTS
from ..rows.divide import DividedRows
from ..sources import ThoughtSource
from .head_loss import HeadLoss
from .host import Host
from .interface import Pass


class ResponsePass(Pass):
    """Runs thoughts and responses with gradient, and computes the loss in place of the head if possible.

    Args:
        host: The host of the base.
        source: The active adapter's thought source.
        rows: The split rows.
        states: The source's states, `(B, K, N, H_source)`.
    """

    def __init__(self, host: Host, source: ThoughtSource, rows: DividedRows, states: Tensor) -> None:
        super().__init__(host, source)
        self.rows = rows
        self.head_loss: HeadLoss | None = None  # computes the loss in place of the head; `None`: the base does
        self.writing = Writing(host.layer, states, rows.placement.start - rows.cut, rows.shape)

    def begin_after(self, inputs: dict[str, Any], cache: Any, replaces_head: bool) -> None:
        """Replace the step's arguments with those of this pass, which computes no unused logits.

        Args:
            inputs: Arguments of the step.
            cache: KV cache of the prompts.
            replaces_head: Whether the loss may be computed in place of the head: head and loss are the base's own, and
                nothing follows the head.
        """
        rows, host = self.rows, self.host
        labels: Tensor | None = rows.labels
        common = (*host.names, *PER_TOKEN_OUTPUTS, "return_dict", "num_items_in_batch")
        # A trainer's own head in the forward (TRL's) has its own arguments and may not accept others.
        known = all(name in common for name, value in inputs.items() if value is not None)
        if replaces_head and known:
            number = inputs.pop("num_items_in_batch", None)
            vocabulary = host.model.config.get_text_config(decoder=True).vocab_size
            head = host.model.get_output_embeddings()
            self.head_loss = HeadLoss(head, rows.predicts, rows.targets, number, vocabulary)
            labels = None
        elif rows.skipped and known and "logits_to_keep" in host.names:
            # Indices, not a number: a slice of several rows is not contiguous and would be multiplied row by row.
            inputs["logits_to_keep"] = torch.arange(rows.skipped, rows.shape[1], device=rows.labels.device)
            labels = rows.labels[:, rows.skipped :].contiguous()
        inputs.pop("attention_mask", None)
        inputs.update(rows.response, labels=labels, use_cache=True, **{CACHE_NAME: cache})

    def finish(self, output: Any) -> Any:
        """Align the outputs with the caller's tokens.

        The output has no logits, because those of the prompts are not computed. Other values of tokens before the
        thoughts are 0. The cache is omitted, because its columns differ from the caller's.
        """
        self.check_written()
        rows = self.rows
        fields = {name: value for name, value in output.items() if name not in (*CACHE_NAMES, "logits")}
        if self.head_loss is not None:
            fields["loss"] = self.head_loss.loss
        for name, value in fields.items():
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows.shape[0]:
                missing = rows.shape[1] - value.shape[1]
                if missing in (0, 1):  # 1: already aligned with shifted labels
                    fields[name] = rows.align(value, rows.length - missing)
        return type(output)(**fields)
