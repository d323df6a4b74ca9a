"""`compute_thoughts`: computes the states of all prompts of a data set."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..passes.host import Host
from ..rows.facts import IGNORED
from ..rows.placement import prompts
from ..sources import ThoughtSource
from ..sources.describe import describe
from .active import computable
from .fingerprint import N, fingerprint, to_json
from .lookup import FINGERPRINT, GIVEN, INPUT, INPUT_KEY, KEY, STATES, prompt_keys, refuse_conflicts

_OWN_IDS, _OWN_MASK = "assistant_input_ids", "assistant_attention_mask"
_RESPONSE_MASKS = ("completion_mask", "assistant_masks")  # columns of TRL, 1 = supervised


class ComputeThoughts:
    """The function for `dataset.map` that [`compute_thoughts`] returns.

    `datasets` derives its cache key from the pickle of this object, which holds exactly what determines the results
    and is the same in every process.
    """

    def __init__(self, host: Host, source: ThoughtSource, num_thoughts: int | None) -> None:
        self._host = host
        self._source = source
        self._num = num_thoughts
        self._fingerprint = fingerprint(source, num_thoughts or source.config.num_thought_tokens)

    def __repr__(self) -> str:
        number = "" if self._num is None else f", num_thought_tokens={self._num}"
        return f"{type(self).__name__}({describe(self._source)}{number})"

    def __reduce__(self) -> tuple[Any, ...]:
        marker = self._source.config.response_marker
        state = to_json(self._fingerprint), self._num, self._source.thought_token_id
        return _InOtherProcess, state if marker is None else (*state, marker)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the states of a batch of rows.

        Args:
            batch: Columns of a tokenized data set: `input_ids`, else `prompt_ids`, and optionally `attention_mask`.
                With `labels`, or TRL's `completion_mask` or `assistant_masks`, a prompt ends before the first
                supervised token, otherwise at the end of the row; with `response_marker`, before the marker. With
                `assistant_input_ids`, rows that end in N thought positions, and optionally `assistant_attention_mask`,
                the assistant reads these instead of the prompts, and the states are still stored for the base's.

        Returns:
            The columns `assistant_hidden_states`, `N x H_assistant` numbers per row in the assistant's dtype (bfloat16
            as float32); `thoughts_key`, int64; `thoughts_fingerprint`, JSON; and, with `assistant_input_ids`,
            `assistant_input_key`, int64.

        Raises:
            TypeError: A column does not hold rows of ids.
            ValueError: A column is missing, N is not the length of the run, or the `assistant_input_ids` are invalid
                or differ between rows with the same prompt.
        """
        inputs, own = _padded(batch), _own_input(batch)
        placement = self._host.locate(inputs, self._source, self._fingerprint[N])
        num = placement.num_thoughts
        if self._num not in (None, num):
            raise ValueError(
                f"`num_thought_tokens` must be the length of the run in the prompts, {num}, got {self._num}. Leave it "
                "out where prompts hold the run."
            )
        with torch.no_grad():
            read, chains = self._host.read, self._source.select_chains(None)
            states = read(inputs["input_ids"], placement, self._source, own, afresh=True, chains=chains).cpu()
        if states.dtype == torch.bfloat16:  # not supported by Arrow
            states = states.float()
        keys = prompt_keys(*prompts(inputs["input_ids"], placement), num)
        found = {STATES: states.flatten(1).numpy(), KEY: keys.numpy()}
        depends = self._fingerprint | {N: num}
        if own:
            own_keys = prompt_keys(own[_OWN_IDS], own[_OWN_MASK], num)
            refuse_conflicts(keys, own_keys)
            found[INPUT_KEY] = own_keys.numpy()
            depends[INPUT] = GIVEN
        return found | {FINGERPRINT: [to_json(depends)] * len(keys)}


class _InOtherProcess:
    """The object that a pickled `ComputeThoughts` loads as. It only raises."""

    def __init__(self, *state: str | int | None) -> None:
        self._state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return _InOtherProcess, self._state

    def __call__(self, batch: Any) -> Any:
        raise RuntimeError(
            "`compute_thoughts` must run in the process that made it, which holds the assistant, but was sent to "
            "another one. Call `dataset.map` without `num_proc`."
        )


def compute_thoughts(model: nn.Module, num_thought_tokens: int | None = None) -> ComputeThoughts:
    """Return a function for `dataset.map` that computes the thoughts of a data set, for [`use_thoughts`].

    `datasets` shows the progress, stores the result in an Arrow file and reuses it in later runs, unless the
    assistant, its commit, its template, the tokens or N have changed. The result for an in-memory data set stays in
    memory unless `cache_file_name` is set. The result holds the assistant's hidden states, `N x H_assistant` numbers
    per row; the projection, which training changes, is applied later. The assistant runs on the model's device.

    If the data set has the column `assistant_input_ids`, the assistant reads it instead of the prompts. Training on
    the data set then needs neither the column nor the assistant, but prompts that are not in it do: pass
    `assistant_input_ids` with them, because the assistant would read these prompts themselves.

    Args:
        model: The PEFT model, or the base that the adapter was injected into. Its active adapter is used.
        num_thought_tokens: N for prompts without a run of `thought_token`. `None`: as in training.

    Returns:
        A function of a dict of columns, for `dataset.map(..., batched=True)`. [`ComputeThoughts.__call__`] documents
        the columns.

    Raises:
        TypeError: N is not an integer.
        ValueError: The model has no active SoftCoT adapter, or N is less than 1.

    Example:
        ```python
        from softcot_peft import compute_thoughts, use_thoughts

        thoughts = dataset.map(compute_thoughts(model), batched=True, batch_size=16)
        use_thoughts(model, thoughts)
        ```
    """
    if num_thought_tokens is not None and type(num_thought_tokens) is not int:
        raise TypeError(f"`num_thought_tokens` must be an integer, got {num_thought_tokens!r}.")
    if num_thought_tokens is not None and num_thought_tokens < 1:
        raise ValueError(f"`num_thought_tokens` must be at least 1, got {num_thought_tokens}.")
    host, source = computable(model)
    return ComputeThoughts(host, source, num_thought_tokens)


def _padded(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the columns that determine where the prompts are, as inputs of a forward pass: `(B, L)`, right-padded.

    The tensors stay on the CPU; the assistant moves its input to its device.
    """
    name = "input_ids" if "input_ids" in batch else "prompt_ids"
    if name not in batch:
        raise ValueError(f"`input_ids` must be a column, got {sorted(batch)}. Tokenize the data set first.")
    if any(isinstance(row, int) for row in batch[name]):
        raise TypeError(f"`{name}` must hold rows of ids, got single ids. Pass `batched=True` to `dataset.map`.")
    ids = [torch.as_tensor(row) for row in batch[name]]
    masks = (
        batch["attention_mask"] if "attention_mask" in batch and name == "input_ids" else [row * 0 + 1 for row in ids]
    )
    pad = functools.partial(pad_sequence, batch_first=True)
    inputs = {"input_ids": pad(ids), "attention_mask": pad([torch.as_tensor(row) for row in masks])}
    if name == "input_ids" and "labels" in batch:
        inputs["labels"] = pad([torch.as_tensor(row) for row in batch["labels"]], padding_value=IGNORED)
    elif name == "input_ids" and (predicted := [mask for mask in _RESPONSE_MASKS if mask in batch]):
        labels = inputs["input_ids"]
        for mask in predicted:
            labels = labels.where(pad([torch.as_tensor(row) for row in batch[mask]]) == 1, IGNORED)
        inputs["labels"] = labels
    return inputs


def _own_input(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what the assistant reads instead of the prompts, `(B, P)`, left-padded; empty without the columns."""
    if _OWN_IDS not in batch:
        if _OWN_MASK in batch:
            raise ValueError(
                f"`{_OWN_MASK}` is the mask of `{_OWN_IDS}`, which is no column. Add it, or leave both out."
            )
        return {}
    if any(row is None for name in (_OWN_IDS, _OWN_MASK) for row in batch.get(name, ())):
        raise ValueError(f"`{_OWN_IDS}` must be given for all rows of a data set or for none, but some have None.")
    ids = [torch.as_tensor(row) for row in batch[_OWN_IDS]]
    masks = [torch.as_tensor(row) for row in batch.get(_OWN_MASK, [torch.ones_like(row) for row in ids])]
    for place, (row, mask) in enumerate(zip(ids, masks, strict=True)):
        if row.shape != mask.shape:
            raise ValueError(
                f"`{_OWN_MASK}` must be as long as `{_OWN_IDS}`, got {tuple(mask.shape)} and {tuple(row.shape)} in "
                f"row {place}. Make both with the assistant's tokenizer."
            )
        if row.dim() != 1 or row.is_floating_point():
            raise TypeError(f"`{_OWN_IDS}` must hold rows of ids, got {row.tolist()!r} in row {place}.")
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    return {_OWN_IDS: pad(ids), _OWN_MASK: pad(masks)}
