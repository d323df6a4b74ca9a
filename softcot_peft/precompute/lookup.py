"""Looks up precomputed thoughts by the prompt's token ids. Independent of models, adapters and tokenizers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sized
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

STATES, KEY, FINGERPRINT = "assistant_hidden_states", "thoughts_key", "thoughts_fingerprint"  # columns
COLUMNS = (STATES, KEY, FINGERPRINT)
INPUT_KEY = "assistant_input_key"  # column of thoughts that were computed from `assistant_input_ids`
INPUT, GIVEN = "assistant_input", "given"  # field of their fingerprints, and its value
_GOLDEN_RATIO = -7046029254386353131  # 2^64 / golden ratio, as a signed number: odd, spreads small integers best


def prompt_keys(prompt_ids: Tensor, prompt_mask: Tensor, num_thoughts: int) -> Tensor:
    """Return a 64-bit key of each prompt and N: `sum_j f_j m(id_j) + f_N N mod 2^64`, j counted from the prompt's end.

    The factors `f_j` and the mixed ids `m(id)` are odd, so every token contributes a nonzero term, including id 0 and
    the first token, and a prompt and its suffix have different keys. Keys do not depend on padding. Two prompts
    collide with a probability of about 2^-64.

    Args:
        prompt_ids: `(B, P)`. Prompts end in the last column.
        prompt_mask: `(B, P)`, 1 = part of the prompt.
        num_thoughts: N.

    Returns:
        `(B,)` int64.
    """
    length = prompt_ids.shape[1]
    factors = _factors(1 << length.bit_length(), prompt_ids.device)
    spread = (prompt_ids.long() + 1) * _GOLDEN_RATIO
    spread = (spread ^ (spread >> 32)) | 1
    return (spread * factors[-length - 1 : -1] * prompt_mask).sum(1) + factors[-1] * num_thoughts


@lru_cache(maxsize=32)
def _factors(length: int, device: torch.device) -> Tensor:
    """Return fixed pseudo-random odd numbers `(length,)`. The last ones are the same for every length."""
    return torch.tensor([_splitmix64(place) | 1 for place in reversed(range(length))], device=device)


def _splitmix64(number: int) -> int:
    """Return SplitMix64 (Steele, Lea and Flood, 2014) of a number, as a signed number."""
    most = 2**64 - 1
    number = (number + 1) * 0x9E3779B97F4A7C15 & most
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & most
    number = (number ^ number >> 27) * 0x94D049BB133111EB & most
    number ^= number >> 31
    return number - 2**64 if number >> 63 else number


def refuse_conflicts(keys: Tensor, input_keys: Tensor) -> None:
    """Reject rows with the same prompt and different inputs of the assistant: only one could be found.

    Args:
        keys: `(B,)`, of the base's prompts.
        input_keys: `(B,)`, of what the assistant reads for them.

    Raises:
        ValueError: There are such rows.
    """
    ordered, order = keys.sort(stable=True)
    inputs = input_keys[order]
    conflicts = (ordered[1:] == ordered[:-1]) & (inputs[1:] != inputs[:-1])
    if conflicts.any():
        place = int(conflicts.int().argmax())
        raise ValueError(
            "`assistant_input_ids` must be the same for the same prompt, because thoughts are found by the base's "
            f"prompt, but rows {int(order[place])} and {int(order[place + 1])} have one prompt and two inputs. Leave "
            "one of the rows out, or pass `assistant_input_ids` in each batch and do not precompute."
        )


class _Columns:
    """In-memory columns, as [`compute_thoughts`] returns them for a batch."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self.keys = torch.as_tensor(columns[KEY])
        self.states = torch.as_tensor(columns[STATES])
        self.input_keys = torch.as_tensor(columns[INPUT_KEY]) if INPUT_KEY in columns else None
        found = columns[FINGERPRINT]
        self.fingerprints = {found} if isinstance(found, str) else set(found)

    def take(self, rows: Tensor) -> Tensor:
        """Return the hidden states of some rows, `(B, ...)`."""
        return self.states[rows]


class _Dataset:
    """A data set of Hugging Face `datasets`. Hidden states stay on disk, memory-mapped, until a row is read.

    Rows are read as Arrow tables, which keep the dtype: other formats convert float64 to float32.
    """

    def __init__(self, dataset: Any) -> None:
        given = [INPUT_KEY] if INPUT_KEY in dataset.column_names else []
        table = dataset.with_format("arrow", columns=[KEY, FINGERPRINT, *given])[:]
        self.keys = torch.tensor(table.column(KEY).to_numpy())
        self.input_keys = torch.tensor(table.column(INPUT_KEY).to_numpy()) if given else None
        self.fingerprints = set(table.column(FINGERPRINT).unique().to_pylist())
        self.states = dataset.with_format("arrow", columns=[STATES])

    def take(self, rows: Tensor) -> Tensor:
        """Return a copy of the hidden states of some rows, `(B, N x H)`."""
        chunks = self.states[rows.tolist()].column(STATES).chunks  # views of the file
        return torch.from_numpy(np.concatenate([chunk.flatten().to_numpy() for chunk in chunks])).view(len(rows), -1)


class ThoughtLookup:
    """The assistant's hidden states for the prompts of a data set, by [`prompt_keys`].

    Copies of a model share the lookup. Pickles of a model do not contain it.

    Args:
        dataset: A data set of `datasets`, or a dict of columns, with the `COLUMNS` of [`compute_thoughts`].

    Raises:
        TypeError: The data set is streamed.
        ValueError: The data set has no rows or lacks a column.
    """

    def __init__(self, dataset: Any) -> None:
        remedy = "Make it with `dataset.map(compute_thoughts(model), batched=True, batch_size=16)`."
        streamed = not isinstance(dataset, Sized)
        if streamed:
            raise TypeError(
                f"`dataset` must be read in any order, got {type(dataset).__name__}. Streamed data sets cannot be; "
                "write this one to disk, and load it from there."
            )
        in_memory = isinstance(dataset, Mapping)
        names = list(dataset if in_memory else dataset.column_names)
        if missing := [name for name in COLUMNS if name not in names]:
            raise ValueError(f"`dataset` must hold the columns {missing}, got {names}. {remedy}")
        self._table = _Columns(dataset) if in_memory else _Dataset(dataset)
        if len(self._table.keys) == 0:
            raise ValueError(f"`dataset` must hold rows, got none. {remedy}")
        self.keys, self._order = self._table.keys.sort(stable=True)
        self._warned = False

    @property
    def fingerprints(self) -> list[dict[str, Any]]:
        """The distinct fingerprints of the thoughts."""
        return [json.loads(text) for text in sorted(self._table.fingerprints)]

    def refuse_conflicts(self) -> None:
        """Reject rows with the same prompt and different `assistant_input_ids`."""
        if self._table.input_keys is not None:
            refuse_conflicts(self._table.keys, self._table.input_keys)

    def __deepcopy__(self, memo: dict[int, Any]) -> ThoughtLookup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _none_after_unpickling, ()

    def find(self, prompt_ids: Tensor, prompt_mask: Tensor, num_thoughts: int) -> Tensor | None:
        """Return the hidden states of a batch's prompts, or `None` if any is missing, with a warning the first time.

        Args:
            prompt_ids: `(B, P)`. Prompts end in the last column.
            prompt_mask: `(B, P)`, 1 = part of the prompt.
            num_thoughts: N. Only thoughts computed with the same N match: a larger N has the same first thoughts only
                if the template does not mention N.

        Returns:
            `(B, K * N * H_source)` on the CPU, in the dtype in which they are stored.
        """
        keys = prompt_keys(prompt_ids, prompt_mask, num_thoughts).cpu()
        places = torch.searchsorted(self.keys, keys).clamp_(max=len(self.keys) - 1)
        missing = self.keys[places] != keys
        if missing.any():
            self._warn(missing, num_thoughts)
            return None
        return self._table.take(self._order[places]).flatten(1)

    def _warn(self, missing: Tensor, num_thoughts: int) -> None:
        if self._warned:
            return
        self._warned = True
        own = ""
        if any(found.get(INPUT) == GIVEN for found in self.fingerprints):
            own = (
                " Its thoughts were computed from `assistant_input_ids`, but the assistant reads these prompts "
                "themselves: pass `assistant_input_ids` with them."
            )
        warnings.warn(
            f"The data set given to `use_thoughts` lacks thoughts for {int(missing.sum())} of {len(missing)} prompts "
            f"of a batch, with {num_thoughts} thoughts each, so that the assistant runs for this batch, and for "
            "others like it without another warning. If they are its own prompts, compute its thoughts from the same "
            f"tokens and number of thoughts; if not, add them to it, or call `use_thoughts(model, None)`.{own}",
            stacklevel=2,
        )


def _none_after_unpickling() -> None:
    """Return `None`, which replaces a lookup in pickles."""
