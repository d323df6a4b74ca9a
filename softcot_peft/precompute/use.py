"""`use_thoughts`: looks thoughts up in a data set instead of running the source."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..attached import active
from .active import computable
from .fingerprint import refuse_stale
from .lookup import ThoughtLookup


def use_thoughts(model: nn.Module, dataset: Any | None) -> None:
    """Look thoughts up in a data set instead of running the assistant, in training, evaluation and `generate`.

    Thoughts are found by the tokens of the prompt and N, so trainers and collators work without changes. The weights
    of an assistant that this package loaded are freed, or never loaded; a model registered with `use_assistant` stays
    in memory. If a prompt of a batch is missing from the data set, the assistant runs for this batch, and is loaded
    again if needed; a warning is shown the first time. Batches with `assistant_input_ids` are not looked up. To use
    several data sets, or several N, combine them with `concatenate_datasets`.

    Args:
        model: The PEFT model, or the base that the adapter was injected into. Its active adapter is used.
        dataset: The result of `dataset.map(compute_thoughts(model), ...)`, in memory or on disk, with the columns
            `assistant_hidden_states`, `thoughts_key` and `thoughts_fingerprint`, or a dict of these columns, which
            `compute_thoughts(model)(batch)` returns. `None`: the assistant runs again.

    Raises:
        TypeError: The data set is streamed.
        ValueError: The thoughts do not match the active adapter's assistant, template, tokens or N; a column is
            missing; only some thoughts were computed from `assistant_input_ids`, or the same prompt has two of them;
            or the model has no active SoftCoT adapter.

    Example:
        ```python
        from softcot_peft import compute_thoughts, use_thoughts

        thoughts = dataset.map(compute_thoughts(model), batched=True, batch_size=16)
        use_thoughts(model, thoughts)  # the assistant does not run any more
        outputs = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=8)
        use_thoughts(model, None)  # the assistant runs again
        ```
    """
    if dataset is None:
        active(model)[1].precomputed = None
        return
    _, source = computable(model)
    lookup = ThoughtLookup(dataset)
    refuse_stale(lookup.fingerprints, source)
    lookup.refuse_conflicts()
    source.precomputed = lookup
    source.release()
