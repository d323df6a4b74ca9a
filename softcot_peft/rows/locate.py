"""Locates the thought positions of a batch, and rejects batches in which they are ambiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from .facts import Facts, read_facts
from .placement import Placement
from .refusals import explain, explain_ids, explain_mask, explain_missing_run


def locate(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    num_thoughts: int,
    thought_token_id: int | None = None,
    run_required: bool = False,
    vocabulary: int | None = None,
    shared_vocabulary: int | None = None,
    starts: Tensor | None = None,
) -> Placement:
    """Locate the thought positions of every row.

    A run of unlabelled thought tokens marks them, and its length is N. Otherwise, thoughts are placed at `starts`, if
    given, else before the first label other than -100, or after the last attended token in rows without labels.
    Labelled thought tokens are text. The results of all checks are copied from the device at once.

        >>> locate(torch.tensor([[5, 6, 7]]), None, torch.tensor([[-100, -100, 7]]), num_thoughts=4).start
        tensor([2])

    Args:
        input_ids: `(B, L)` int64, padded on either side; `None` with embeddings.
        attention_mask: `(B, L)`, 1 = attended. `None`: all are attended.
        labels: `(B, L)`, -100 = ignored. `None`: no labels.
        num_thoughts: N for automatic placement.
        thought_token_id: Id of the thought token; `None`: automatic placement only.
        run_required: Whether to reject prompts without a run.
        vocabulary: Number of ids the base has embeddings for; `None`: not checked.
        shared_vocabulary: The same for an assistant that reads the base's ids; `None`: not checked.
        starts: Column of the first thought of each row without a run, `(B,)`, found by a marker in the text; `None`:
            labels and mask decide.

    Returns:
        The placement, in the caller's columns.

    Raises:
        ValueError: The rows have different numbers of thought tokens; a run is interrupted; thoughts follow all
            labels; the labels of a row form several runs under automatic placement; a row has no prompt; an id is
            outside of the vocabulary; the mask is not a padding mask; or a required run is missing.
    """
    facts = read_facts(input_ids, attention_mask, labels, thought_token_id, starts)
    checks = _checks(facts, input_ids, attention_mask, vocabulary, shared_vocabulary)
    after = facts.attended_end - facts.start
    values = [
        *checks.values(),
        facts.counts.amax(),
        ~facts.attended.all(),
        facts.start.amax(),
        facts.start.amin(),
        (facts.end - facts.start).amax(),
        (facts.labelled & facts.before).any(),
        after.amin(),
        after.amax(),
    ]
    *failed, num_run, padded, latest, earliest, max_span, early, least, most = torch.stack(
        [v.long() for v in values]
    ).tolist()
    for name, fails in zip(checks, failed, strict=True):
        if not fails:
            continue
        if name == "mask" and attention_mask is not None:
            raise ValueError(explain_mask(attention_mask))
        if name in ("vocabulary", "shared") and input_ids is not None:
            raise ValueError(explain_ids(name, input_ids, vocabulary, shared_vocabulary))
        raise ValueError(explain(name, facts))
    if run_required and not num_run:
        raise ValueError(explain_missing_run(facts, input_ids, thought_token_id, labels is not None))
    num = num_run or num_thoughts
    tail = most if least == most else None
    return Placement(
        facts.start, num, not num_run, attention_mask, bool(padded), latest, earliest, max_span, bool(early), tail
    )


def has_run(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, thought_token_id: int | None
) -> bool:
    """Return whether any row has a thought token that marks thought positions; `(B, L)` each."""
    if thought_token_id is None:
        return False
    return bool(read_facts(input_ids, attention_mask, labels, thought_token_id).uses_run)


def check_ids(input_ids: Tensor, vocabulary: int | None) -> None:
    """Reject ids `(B, L)` without an embedding in the base."""
    if vocabulary is not None and ((input_ids < 0) | (input_ids >= vocabulary)).any():
        raise ValueError(explain_ids("vocabulary", input_ids, vocabulary, None))


def _checks(
    facts: Facts,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    vocabulary: int | None,
    shared_vocabulary: int | None,
) -> dict[str, Tensor]:
    """Return the checks that a batch may fail, by name, each `()` bool."""
    passed = facts.uses_run & False
    has_labels = facts.last_label >= 0
    checks = {
        "mask": passed,
        "counts": (facts.counts != facts.counts[0]).any(),
        "broken": facts.uses_run & (facts.run_end - facts.run_start != facts.counts).any(),
        "late": (has_labels & (facts.last_label < torch.where(facts.uses_run, facts.run_end, facts.start))).any(),
        "turns": ~facts.uses_run & (facts.label_runs.sum(1) > 1).any(),
        "promptless": ~facts.prompt.any(1).all(),
        "vocabulary": passed,
        "shared": passed,
    }
    if attention_mask is not None:
        checks["mask"] = ~facts.attended.eq(attention_mask).all()
    if input_ids is not None and vocabulary is not None:
        checks["vocabulary"] = ((input_ids < 0) | (input_ids >= vocabulary)).any()
    if input_ids is not None and shared_vocabulary is not None:
        checks["shared"] = ((input_ids >= shared_vocabulary) & facts.prompt).any()
    return checks
