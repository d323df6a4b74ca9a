"""`split_conversations`: one prompt-completion row per assistant turn, since a row has only one run of thoughts."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Mapping
from typing import Any

_PROMPT, _COMPLETION = "prompt", "completion"


def split_conversations(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Split conversations into one prompt-completion row per assistant turn, with `dataset.map`.

    In training, thoughts precede the first label of a row; in `generate`, they precede the new turn. A row with
    several supervised turns (TRL's `assistant_only_loss`) therefore has no single correct place for thoughts. After
    splitting, each turn has the same thoughts as in `generate`. The loss covers the same turns: TRL supervises
    completions only, so leave `assistant_only_loss` off. Each row repeats the messages before its turn.

    `datasets` infers the types of new columns from the first batch. If `map` reports that it "couldn't cast" a later
    batch, because the first tool call comes late, pass `batch_size=None`. For streamed data sets without known
    columns, list the names in `remove_columns`.

    Args:
        batch: Columns of a batch: `messages`, lists of `{"role": ..., "content": ...}`; or `prompt` and `completion`,
            also such lists, of which the assistant turns of the completion are split. Other keys of messages are kept,
            including `None` for missing ones.

    Returns:
        `prompt`, the messages before the turn; `completion`, the turn; and all other columns, repeated. Conversations
        without an assistant turn, and assistant turns without a message before them, which would leave the thoughts
        without a prompt, are left out with a warning.

    Raises:
        TypeError: `batch` is a single row, or a conversation is not a list of messages.
        ValueError: The columns are missing.

    Example:
        ```python
        rows = dataset.map(softcot_peft.split_conversations, batched=True, remove_columns=dataset.column_names)
        trainer = SFTTrainer(model, args=SFTConfig(...), train_dataset=rows, peft_config=SoftCoTConfig(...))
        ```
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"`batch` must hold the columns of a batch, got {type(batch).__name__}. Pass the function to "
            "`dataset.map(split_conversations, batched=True, remove_columns=dataset.column_names)`."
        )
    columns = ["messages"] if "messages" in batch else [_PROMPT, _COMPLETION]
    if any(name not in batch for name in columns):
        raise ValueError(
            f"Conversations must be in a column `messages`, or in `{_PROMPT}` and `{_COMPLETION}`, got the columns "
            f"{', '.join(sorted(batch))}. Rename yours with `dataset.rename_column`."
        )
    conversations = zip(*(batch[name] for name in columns), strict=True)
    others = [name for name in batch if name not in (*columns, _PROMPT, _COMPLETION)]
    rows: dict[str, list[Any]] = {name: [] for name in (_PROMPT, _COMPLETION, *others)}
    silent = opening = False
    for row, parts in enumerate(conversations):
        for name, messages in zip(columns, parts, strict=True):
            _check(name, row, messages)
        messages = [message for part in parts for message in part]
        first = len(parts[0]) if len(parts) > 1 else 0  # only turns of a completion are supervised
        turns = [turn for turn in range(first, len(messages)) if messages[turn]["role"] == "assistant"]
        silent |= not turns
        opening |= 0 in turns
        for turn in filter(None, turns):
            rows[_PROMPT].append(messages[:turn])
            rows[_COMPLETION].append([messages[turn]])
            for name in others:
                rows[name].append(batch[name][row])
    # Without numbers, so that Python shows each warning once instead of once per batch.
    if silent:
        warnings.warn("`split_conversations` leaves out conversations without an assistant turn.", stacklevel=2)
    if opening:
        warnings.warn(
            "`split_conversations` leaves out assistant turns that open their conversation: thoughts need a prompt. "
            "To train on them, put a system or user message before them.",
            stacklevel=2,
        )
    return rows


def _check(name: str, row: int, messages: Any) -> None:
    """Reject a conversation that is not a list of messages."""
    if isinstance(messages, Mapping):
        raise TypeError("`split_conversations` turns one row into several: call `dataset.map` with `batched=True`.")
    if not (isinstance(messages, list) and all(isinstance(m, Mapping) and m.get("role") for m in messages)):
        raise TypeError(
            f"`{name}` must hold lists of messages such as {{'role': 'user', 'content': '...'}}, but row {row} of a "
            f"batch has {reprlib.repr(messages)}."
        )
