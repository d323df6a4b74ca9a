"""Error messages for batches with ambiguous thought positions. Each message names the row and the remedy."""

from __future__ import annotations

from torch import Tensor

from .facts import IGNORED, Facts


def explain(check: str, facts: Facts) -> str:
    """Return the message for a failed check, about the first row that fails."""
    messages = {"counts": _counts, "broken": _broken, "late": _late, "turns": _turns, "promptless": _promptless}
    return messages[check](facts)


def _first(rows: Tensor) -> int:
    return int(rows.int().argmax())


def _counts(facts: Facts) -> str:
    return (
        f"Every row must hold the same number of thought tokens, got {facts.counts.tolist()} by row. Write the same "
        "run into every prompt of a batch, or group prompts by their run."
    )


def _broken(facts: Facts) -> str:
    row = _first(facts.run_end - facts.run_start != facts.counts)
    return (
        f"The thought tokens of a row must stand next to each other, but row {row} has {int(facts.counts[row])} of "
        f"them between columns {int(facts.run_start[row])} and {int(facts.run_end[row]) - 1}. Write one unbroken run; "
        "if the token also occurs elsewhere (as padding, pass `attention_mask`), choose another `thought_token`."
    )


def _late(facts: Facts) -> str:
    if facts.marked and not facts.uses_run:
        row = _first((facts.last_label >= 0) & (facts.last_label < facts.start))
        return (
            f"Some label that is not {IGNORED} must stand after the last `response_marker`, but row {row} has its "
            f"last one in column {int(facts.last_label[row])}, and its thoughts begin in column "
            f"{int(facts.start[row])}. Label the response that the thoughts are for, or the whole text."
        )
    row = _first((facts.last_label >= 0) & (facts.last_label < facts.run_end))
    return (
        f"Some label that is not {IGNORED} must stand after the thought tokens, but row {row} has its last one in "
        f"column {int(facts.last_label[row])} and its last thought token in column {int(facts.run_end[row]) - 1}. "
        "Label the response that the thoughts are for."
    )


def _turns(facts: Facts) -> str:
    row = _first(facts.label_runs.sum(1) > 1)
    return (
        f"The labels of a row must form one run, before which the thoughts stand, but those of row {row} form "
        f"several, which begin in columns {facts.label_runs[row].nonzero()[:, 0].tolist()}: a conversation with "
        "several supervised turns, while `generate` places thoughts before the last one. Make one row per turn: "
        "`dataset.map(softcot_peft.split_conversations, batched=True, remove_columns=dataset.column_names)`; or "
        "label one turn alone, or write a run of `thought_token` where the thoughts belong."
    )


def _promptless(facts: Facts) -> str:
    row = _first(~facts.prompt.any(1))
    if facts.marked and not facts.uses_run:
        return (
            f"Every row needs a prompt before its thoughts, but row {row} begins with `response_marker`. Write the "
            "prompt before it; if the row was truncated on the left, keep more of it."
        )
    return (
        f"Every row needs a prompt before its thoughts, but row {row} has no attended token there. Set the labels of "
        f"the prompt to {IGNORED}; if the whole text is labelled, name the text before the response in "
        "`SoftCoTConfig(response_marker=...)`, or train on prompt and completion instead."
    )


def explain_mask(attention_mask: Tensor) -> str:
    """Return the message for a mask `(B, L)` with values other than 0 and 1."""
    row, column = (int(index) for index in (attention_mask != 0).ne(attention_mask).nonzero()[0])
    return (
        f"`attention_mask` must hold 0 and 1 only, got {attention_mask[row, column].item()} in row {row}. Larger "
        "values are those of packed batches, which cannot carry thoughts: turn packing off, and pass the tokenizer's "
        "mask."
    )


def explain_ids(check: str, input_ids: Tensor, vocabulary: int | None, shared_vocabulary: int | None) -> str:
    """Return the message for ids `(B, L)` without an embedding in a model."""
    least, most = int(input_ids.min()), int(input_ids.max())
    if check == "vocabulary":
        return (
            f"`input_ids` must lie within the base's vocabulary, 0 to {(vocabulary or 0) - 1}, got {least} to {most}. "
            "Tokenize with the base's tokenizer; padding needs an id of the vocabulary too."
        )
    return (
        f"`assistant_shares_tokenizer` feeds the prompt's ids to the assistant, which has {shared_vocabulary}, "
        f"but `input_ids` hold {most}. Set it to False, so that prompts are decoded and encoded again; if "
        "they were added in memory, call `use_tokenizer(tokenizer)` before the adapter is attached."
    )


def explain_missing_run(facts: Facts, input_ids: Tensor | None, thought_token_id: int | None, has_labels: bool) -> str:
    """Return the message for prompts without the run that `placement='thought_token'` requires."""
    is_thought = None if input_ids is None or thought_token_id is None else input_ids == thought_token_id
    if is_thought is not None and (facts.labelled & is_thought).any():
        return (
            "`labels` must be -100 on the run of `thought_token`, but label every thought token. A labelled one is "
            "text of a response: label the response only."
        )
    if is_thought is not None and is_thought.any():
        return (
            "`attention_mask` must not hide the run of `thought_token`, but is 0 wherever `input_ids` hold it. Pass "
            "the tokenizer's mask: without one, `generate` hides the padding token, perhaps the same token."
        )
    remedy = (
        "Let the chat template of `with_thought_tokens` write it, or write it yourself. With "
        "`where='generation_prompt'` the template writes none into rows that are rendered with their response, as TRL "
        "does: train with `placement='prompt_end'`, which puts the thoughts in the same place, or use "
        "`where='user_turn'`."
        if has_labels
        else "The adapter was trained with the run in the prompt: write it there, or let the chat template of "
        "`with_thought_tokens` do it (pass its tokenizer to pipelines; they do not look in the adapter folder)."
    )
    return (
        "`placement='thought_token'`: every prompt must hold a run of `thought_token`, found none in `input_ids`. "
        f"{remedy}"
    )
