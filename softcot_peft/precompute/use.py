"""`use_thoughts`: looks thoughts up in a data set instead of having the source read."""

from __future__ import annotations

from typing import Any

from torch import nn

from .active import active
from .fingerprint import refuse_stale
from .lookup import ThoughtLookup


def use_thoughts(model: nn.Module, dataset: Any | None) -> None:
    """Look thoughts up in a data set instead of running the assistant, in training, evaluation and `generate`.

    Rows are found by their prompts' tokens and N, so that trainers and collators need not know: they get the data as
    before. An assistant that this package loaded leaves memory, or is never loaded; one given with `use_assistant`
    stays. A batch with a prompt that the data set lacks is read by the assistant, which is loaded again if needed; the
    first time, a warning says so. Several data sets, or several N, are put into one with `concatenate_datasets`.

    Args:
        model: The PEFT model, or the base that the adapter was injected into; its active adapter is meant.
        dataset: What `dataset.map(compute_thoughts(model), ...)` returned, in memory or on disk, with its columns
            `assistant_hidden_states`, `thoughts_key` and `thoughts_fingerprint`; or a dict of these columns, as the
            function itself returns them. `None`: the assistant reads again.

    Raises:
        TypeError: The data set is streamed.
        ValueError: Its thoughts are not those of the active adapter's assistant, template, tokens or N; it lacks a
            column; or the model has no active SoftCoT adapter.
    """
    _, source = active(model)
    if dataset is None:
        source.precomputed = None
        return
    lookup = ThoughtLookup(dataset)
    refuse_stale(lookup.fingerprints, source)
    source.precomputed = lookup
    source.release()
