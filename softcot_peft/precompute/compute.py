"""`compute_thoughts`: the source reads the prompts of a data set once."""

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
from .active import active
from .fingerprint import N, fingerprint, written
from .lookup import FINGERPRINT, KEY, STATES, prompt_keys

_RESPONSE_MASKS = ("completion_mask", "assistant_masks")  # TRL's, 1 = predicted


class ComputeThoughts:
    """The function for `dataset.map` that [`compute_thoughts`] makes.

    `datasets` names its cache after the pickle of this: all that decides its results, the same in every process.
    """

    def __init__(self, host: Host, source: ThoughtSource, num_thoughts: int | None) -> None:
        self._host = host
        self._source = source
        self._num = num_thoughts
        self._fingerprint = fingerprint(source, num_thoughts or source.config.num_thought_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Elsewhere, (written(self._fingerprint), self._num, self._source.thought_token_id)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the thoughts of some rows.

        Args:
            batch: Columns of token ids: `input_ids`, else `prompt_ids`; with `labels`, or TRL's `completion_mask` or
                `assistant_masks`, the prompt ends before the first that is predicted, else with the row. A column
                `attention_mask` is 0 at padding.

        Returns:
            `assistant_hidden_states`, a row's `N x H_assistant` numbers in the assistant's dtype (bfloat16 as
            float32); `thoughts_key`, int64; and `thoughts_fingerprint`, JSON.
        """
        inputs = _padded(batch)
        placement = self._host.locate(inputs, self._source, self._fingerprint[N])
        num = placement.num_thoughts
        if self._num not in (None, num):
            raise ValueError(
                f"`num_thought_tokens` must be the length of the run in the prompts, {num}, got {self._num}. Leave it "
                "out where prompts hold the run."
            )
        with torch.no_grad():
            states = self._host.read(inputs["input_ids"], placement, self._source, afresh=True).cpu()
        if states.dtype == torch.bfloat16:  # which Arrow does not know
            states = states.float()
        keys = prompt_keys(*prompts(inputs["input_ids"], placement), num)
        text = written(self._fingerprint | {N: num})
        return {STATES: states.flatten(1).numpy(), KEY: keys.numpy(), FINGERPRINT: [text] * len(keys)}


class _Elsewhere:
    """What `ComputeThoughts` is in another process."""

    def __init__(self, *state: str | int | None) -> None:
        self._state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return _Elsewhere, self._state

    def __call__(self, batch: Any) -> Any:
        raise RuntimeError(
            "`compute_thoughts` must run in the process that made it, which holds the assistant, but was sent to "
            "another one. Call `dataset.map` without `num_proc`."
        )


def compute_thoughts(model: nn.Module, num_thought_tokens: int | None = None) -> ComputeThoughts:
    """Make the function that computes the thoughts of a data set, for [`use_thoughts`].

        thoughts = dataset.map(compute_thoughts(model), batched=True, batch_size=16)

    `datasets` shows its progress, keeps the result in an Arrow file, and finds it again when the script is run again,
    unless the assistant, its commit, template, tokens or N have changed. (What it makes of a data set in memory stays
    in memory, unless `cache_file_name` says where to put it.) Kept is what the assistant says, `N x H_assistant`
    numbers a row; the projection, which training changes, is applied to them as ever. The assistant runs where the
    model is.

    Args:
        model: The PEFT model, or the base that the adapter was injected into; its active adapter's thoughts.
        num_thought_tokens: N where the prompts hold no run of `thought_token`. `None`: as in training.

    Returns:
        A function of columns by name, as `dataset.map(..., batched=True)` calls it. See
        [`ComputeThoughts.__call__`] for the columns it reads and returns.

    Raises:
        TypeError: N is no integer.
        ValueError: The model has no active SoftCoT adapter, or N is below 1.
    """
    if num_thought_tokens is not None and type(num_thought_tokens) is not int:
        raise TypeError(f"`num_thought_tokens` must be an integer, got {num_thought_tokens!r}.")
    if num_thought_tokens is not None and num_thought_tokens < 1:
        raise ValueError(f"`num_thought_tokens` must be at least 1, got {num_thought_tokens}.")
    host, source = active(model)
    return ComputeThoughts(host, source, num_thought_tokens)


def _padded(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The columns that say where the prompts are, as a forward takes them: each `(B, L)`, padded on the right.

    In host memory: the assistant takes its input to where it runs.
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
