"""Runs a causal LM without its head over padded prompts, so that every row reads as it does alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compat.models import takes_positions
from ..rows.placement import positions


class Backbone:
    """A backbone, and what was found out about it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._takes_positions = takes_positions(model)
        self._skips_padding: bool | None = None  # not known before there is padding

    def last_states(self, input_ids: Tensor, attention_mask: Tensor, num: int) -> Tensor:
        """The last `num` hidden states of each row, `(B, num, H)`, of left-padded ids and mask `(B, L)`."""
        if self._skips_padding is not True and (attention_mask == 0).any():
            if self._skips_padding is None:
                self._skips_padding = self._try_padding(input_ids[attention_mask.sum(1).argmax()])
            if not self._skips_padding:
                return self._by_length(input_ids, attention_mask, num)
        states: Tensor = self.model(**self._arguments(input_ids, attention_mask)).last_hidden_state
        return states[:, -num:].clone()  # not a view, which would hold the states of whole prompts

    def _arguments(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, "return_dict": True}
        if self._takes_positions:
            arguments["position_ids"] = positions(attention_mask)
        return arguments

    def _try_padding(self, ids: Tensor) -> bool:
        """Whether the model reads a text the same with padding before it.

        Attention that is told mask and positions does. Some models count positions by column (BART and its kin) or
        take padding into a recurrent state (RWKV, xLSTM, RecurrentGemma; transformers 5.23), and nothing in their
        config or signature tells. So it is tried once, on a row with its beginning masked: the hidden states of such
        models change by as much as they are large, those of the others by rounding, 1 % in bfloat16.
        """
        row, start = ids[None], max(1, len(ids) // 4)
        mask = torch.ones_like(row)
        mask[:, :start] = 0
        # Not through `__call__`: who counts the assistant's passes with hooks is to see its prompts alone.
        padded, alone = (
            self.model.forward(**self._arguments(*arguments)).last_hidden_state[:, start - len(ids) :].float()
            for arguments in ((row, mask), (row[:, start:], mask[:, start:]))
        )
        return bool((padded - alone).norm() < 0.05 * alone.norm())

    def _by_length(self, input_ids: Tensor, attention_mask: Tensor, num: int) -> Tensor:
        """As `last_states`: the rows of each length together, without their padding, one pass per length."""
        lengths = attention_mask.count_nonzero(dim=1)
        order, found = lengths.argsort(stable=True), []
        for length in lengths.unique().tolist():
            rows = lengths == length
            ids = input_ids[rows][attention_mask[rows] != 0].view(-1, length)
            output = self.model(**self._arguments(ids, torch.ones_like(ids)))
            found.append(output.last_hidden_state[:, -num:].clone())
        return torch.cat(found)[order.argsort()]
