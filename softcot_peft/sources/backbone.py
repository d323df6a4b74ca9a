"""Runs a causal LM without its head on padded prompts, so that each row has the same states as without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat.models import takes_positions
from ..rows.placement import positions


class Backbone:
    """A causal LM without its head, and how it handles padding.

    Args:
        model: The model without its head.
        table: Returns its input embedding, which models without their head may not know.
    """

    def __init__(self, model: PreTrainedModel, table: Callable[[], nn.Module]) -> None:
        self.model = model
        self.table = table
        self._takes_positions = takes_positions(model)
        self._ignores_padding: bool | None = None  # `None` until the first padded batch

    def last_states(
        self, input_ids: Tensor, attention_mask: Tensor, num: int, vectors: Tensor | None = None
    ) -> Tensor:
        """Return the last `num` hidden states of each row.

        Args:
            input_ids: `(B, L)`, left-padded.
            attention_mask: `(B, L)`.
            num: Number of states.
            vectors: `(B, H_embedding)`: what the model reads at the last `num` positions of each row in place of the
                embeddings of their ids. `None`: the ids.

        Returns:
            `(B, num, H)`.
        """
        if self._ignores_padding is not True and (attention_mask == 0).any():
            if self._ignores_padding is None:
                self._ignores_padding = self._check_padding(input_ids[attention_mask.sum(1).argmax()])
            if not self._ignores_padding:
                return self._by_length(input_ids, attention_mask, num, vectors)
        return self._run(input_ids, attention_mask, num, vectors)

    def _run(self, input_ids: Tensor, attention_mask: Tensor, num: int, vectors: Tensor | None) -> Tensor:
        with _reading(self.table, num, vectors):
            states: Tensor = self.model(**self._arguments(input_ids, attention_mask)).last_hidden_state
        return states[:, -num:].clone()  # a view would keep the states of whole prompts in memory

    def _arguments(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, "return_dict": True}
        if self._takes_positions:
            arguments["position_ids"] = positions(attention_mask)
        return arguments

    @torch.no_grad()
    def _check_padding(self, ids: Tensor) -> bool:
        """Return whether left padding leaves the hidden states of a text unchanged.

        Attention with a mask and position ids does. Some models derive positions from the column (BART and related
        models) or carry padding in a recurrent state (RWKV, xLSTM, RecurrentGemma; transformers 5.23), which neither
        their config nor their signature shows. Therefore, this runs a row with its beginning masked once: the hidden
        states of such models change by about their own norm, those of other models by rounding, 1 % in bfloat16.
        """
        row, start = ids[None], max(1, len(ids) // 4)
        mask = torch.ones_like(row)
        mask[:, :start] = 0
        # Calls `forward`, not the module: users' hooks, which may count passes, do not see this check.
        padded, alone = (
            self.model.forward(**self._arguments(*arguments)).last_hidden_state[:, start - len(ids) :].float()
            for arguments in ((row, mask), (row[:, start:], mask[:, start:]))
        )
        return bool((padded - alone).norm() < 0.05 * alone.norm())

    def _by_length(self, input_ids: Tensor, attention_mask: Tensor, num: int, vectors: Tensor | None) -> Tensor:
        """Like `last_states`, but without padding: one forward pass for all rows of the same length."""
        lengths = attention_mask.count_nonzero(dim=1)
        order, found = lengths.argsort(stable=True), []
        for length in lengths.unique().tolist():
            rows = lengths == length
            ids = input_ids[rows][attention_mask[rows] != 0].view(-1, length)
            found.append(self._run(ids, torch.ones_like(ids), num, None if vectors is None else vectors[rows]))
        return torch.cat(found)[order.argsort()]


_READING: ContextVar[object] = ContextVar("softcot_reading_vectors", default=None)


@contextmanager
def _reading(find_table: Callable[[], nn.Module], num: int, vectors: Tensor | None) -> Iterator[None]:
    """Put vectors `(B, H_embedding)` at the last `num` positions of the rows that a table embeds.

    A hook on the embedding, not `inputs_embeds`: models scale embeddings in different places, and some read ids, too.
    """
    if vectors is None:
        yield
        return
    mine, table = object(), find_table()
    written: list[bool] = []

    def write(module: nn.Module, args: Any, embeddings: Tensor) -> Tensor | None:
        if _READING.get() is not mine or embeddings.dim() != 3 or len(embeddings) != len(vectors):
            return None  # another thread's pass, or another use of the table
        written.append(True)
        new = vectors.to(embeddings)[:, None].expand(-1, num, -1)
        return torch.cat([embeddings[:, :-num], new], 1)

    handle, token = table.register_forward_hook(write), _READING.set(mine)
    try:
        yield
    finally:
        _READING.reset(token)
        handle.remove()
    if not written:
        raise RuntimeError(
            "The assistant's input embedding must run on the ids of its prompts to train chains, but "
            f"{type(table).__name__} was not run on them. Use `chain_init='fixed'`, or another assistant."
        )
