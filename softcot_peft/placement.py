"""Where the thoughts of a batch go, as pure tensor functions. Knows no models, adapters or tokenizers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .columns import take

IGNORED = -100  # the label that transformers' losses skip


@dataclass(frozen=True)
class Placement:
    """Where the thoughts of a batch stand."""

    start: Tensor  # column of the first thought, per row, `(B,)` int64. The same number in both coordinate systems
    num_thoughts: int  # N
    # Whether the thought positions are added to the caller's columns (automatic placement) or are already among them
    # (a run of thought tokens).
    inserted: bool
    attention_mask: Tensor | None  # the caller's mask `(B, L)`, or `None` where every token is attended
    padded: bool  # whether any token is not attended
    latest: int  # the largest `start`, on the host
    earliest: int  # the smallest, on the host
    reach: int = 0  # the most columns from a row's `start` to behind its last attended or labelled token, on the host
    late: bool = False  # whether labels stand before the thoughts, which no loss may count

    @property
    def column(self) -> int | None:
        """`start` as a number, where it is the same in every row; slices do there what takes an index else."""
        return self.latest if self.latest == self.earliest else None

    @property
    def num_inserted(self) -> int:
        """How many columns the base sees beyond the caller's: N or 0."""
        return self.num_thoughts if self.inserted else 0

    def after(self, seen: int) -> Placement:
        """The same place, counted from column `seen` on."""
        if seen == 0:
            return self
        earliest, latest = self.earliest - seen, self.latest - seen
        return replace(self, start=self.start - seen, earliest=earliest, latest=latest)

    def expand(self, rows: int) -> Placement:
        """Repeat every row for its beams or returned sequences, which stand next to each other."""
        times = rows // self.start.shape[0]
        if times == 1:
            return self
        mask = self.attention_mask
        return replace(
            self,
            start=self.start.repeat_interleave(times),
            attention_mask=None if mask is None else mask.repeat_interleave(times, dim=0),
        )

    def select(self, rows: Tensor) -> Placement:
        """Pick rows, `(B',)` int64, with repetition if wanted."""
        mask, rows = self.attention_mask, rows.to(self.start.device)
        return replace(self, start=self.start[rows], attention_mask=None if mask is None else mask[rows])


def locate(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    num_thoughts: int,
    thought_token_id: int | None = None,
    run_required: bool = False,
    vocabulary: int | None = None,
    shared_vocabulary: int | None = None,
) -> Placement:
    """Find where the thoughts of every row go.

    A run of the thought token that is not labelled says so itself, and its length is N; a labelled thought token is
    text that somebody wrote. Otherwise the thoughts follow the prompt: they stand before the first label that is not
    -100, else, also in a row without labels beside others, after the last attended token.
    All checks of the batch are read from the device together, once.

    Args:
        input_ids: `(B, L)` int64, padded on either side; `None` when the caller passes embeddings.
        attention_mask: `(B, L)`, 1 = attended. `None`: all.
        labels: `(B, L)`, -100 = not predicted. `None` when there are none.
        num_thoughts: N for automatic placement.
        thought_token_id: Id of the thought token; `None`: automatic placement only.
        run_required: Whether a prompt without the run is refused.
        vocabulary: How many ids the base has embeddings for; `None`: not checked.
        shared_vocabulary: How many the assistant has that reads the prompts' ids; `None`: it does not.

    Returns:
        The placement; `start` is a column of the caller's.

    Raises:
        ValueError: Rows disagree, a run is broken or stands after all labels, the labels of a row form several runs
            under automatic placement, a row has no prompt, the mask is not a plain padding mask, or a required run is
            missing.
    """
    reference = next(tensor for tensor in (input_ids, attention_mask, labels) if tensor is not None)
    length = reference.shape[1]
    columns = torch.arange(length, device=reference.device)
    attended = torch.ones_like(reference, dtype=torch.bool) if attention_mask is None else attention_mask != 0

    labelled = torch.zeros_like(attended) if labels is None else labels != IGNORED

    if input_ids is None or thought_token_id is None:
        is_thought = torch.zeros_like(attended)
    else:
        is_thought = (input_ids == thought_token_id) & attended & ~labelled
    counts = is_thought.sum(1)
    run_start = torch.where(is_thought, columns, length).amin(1)
    run_end = torch.where(is_thought, columns, -1).amax(1) + 1

    has_labels, last_label = labelled.any(1), torch.where(labelled, columns, -1).amax(1)
    prompt_end = torch.where(
        has_labels, torch.where(labelled, columns, length).amin(1), torch.where(attended, columns, -1).amax(1) + 1
    )
    begins = labelled & ~nn.functional.pad(labelled, (1, -1))  # where a run of labels begins

    end = torch.where(attended | labelled, columns, -1).amax(1) + 1
    uses_run = counts.amax() > 0
    start = torch.where(uses_run, run_start, prompt_end)
    checks = {
        "mask": ~attended.eq(attention_mask).all() if attention_mask is not None else uses_run & False,
        "counts": (counts != counts[0]).any(),
        "broken": uses_run & (run_end - run_start != counts).any(),
        "late": uses_run & (has_labels & (last_label < run_end)).any(),
        "turns": ~uses_run & (begins.sum(1) > 1).any(),
        "promptless": ~(attended & (columns < start[:, None])).any(1).all(),
        "vocabulary": uses_run & False,
        "shared": uses_run & False,
    }
    if input_ids is not None and vocabulary is not None:
        checks["vocabulary"] = ((input_ids < 0) | (input_ids >= vocabulary)).any()
    if input_ids is not None and shared_vocabulary is not None:
        checks["shared"] = ((input_ids >= shared_vocabulary) & attended & (columns < start[:, None])).any()
    late = (labelled & (columns < start[:, None])).any()
    facts = [*checks.values(), counts.amax(), ~attended.all(), start.amax(), start.amin(), (end - start).amax(), late]
    *failed, num_run, padded, latest, earliest, reach, late = torch.stack([fact.long() for fact in facts]).tolist()
    for name, fails in zip(checks, failed, strict=True):
        if fails and name == "mask" and attention_mask is not None:
            raise ValueError(_explain_mask(attention_mask))
        if fails and name in ("vocabulary", "shared") and input_ids is not None:
            raise ValueError(_explain_ids(name, input_ids, vocabulary, shared_vocabulary))
        if fails:
            prompt = attended & (columns < start[:, None])
            raise ValueError(_explain(name, counts, run_start, run_end, last_label, begins, prompt))
    if run_required and not num_run:
        if input_ids is not None and (labelled & (input_ids == thought_token_id)).any():
            raise ValueError(
                "`labels` must be -100 on the run of `thought_token`, but label every thought token. A labelled one "
                "is text of a response: label the response only."
            )
        if input_ids is not None and thought_token_id is not None and input_ids.eq(thought_token_id).any():
            raise ValueError(
                "`attention_mask` must not hide the run of `thought_token`, but is 0 wherever `input_ids` hold it. "
                "Pass the tokenizer's mask: without one, `generate` hides the padding token, perhaps the same token."
            )
        remedy = (
            "The adapter was trained with the run in the prompt: write it there, or let the chat template of "
            "`with_thought_tokens` do it (pass its tokenizer to pipelines; they do not look beside the adapter)."
            if labels is None
            else "Let the chat template of `with_thought_tokens` write it, or write it yourself. With "
            "`where='generation_prompt'` the template writes none into rows that are rendered with their response, as "
            "TRL does: train with `placement='prompt_end'`, which puts the thoughts in the same place, or use "
            "`where='user_turn'`."
        )
        raise ValueError(
            "`placement='thought_token'`: every prompt must hold a run of `thought_token`, found none in `input_ids`. "
            f"{remedy}"
        )
    num = num_run or num_thoughts
    return Placement(start, num, not num_run, attention_mask, bool(padded), latest, earliest, reach, bool(late))


def _explain(
    name: str,
    counts: Tensor,
    run_start: Tensor,
    run_end: Tensor,
    last_label: Tensor,
    begins: Tensor,
    prompt: Tensor,
) -> str:
    """The message for a failed check of `locate`, naming the first row at fault."""

    def first(rows: Tensor) -> int:
        return int(rows.int().argmax())

    if name == "counts":
        return (
            f"Every row must hold the same number of thought tokens, got {counts.tolist()} by row. Write the same run "
            "into every prompt of a batch, or group prompts by their run."
        )
    if name == "broken":
        row = first(run_end - run_start != counts)
        return (
            f"The thought tokens of a row must stand next to each other, but row {row} has {int(counts[row])} of them "
            f"between columns {int(run_start[row])} and {int(run_end[row]) - 1}. Write one unbroken run; if the token "
            "also occurs elsewhere (as padding, pass `attention_mask`), choose another `thought_token`."
        )
    if name == "late":
        row = first((last_label >= 0) & (last_label < run_end))
        return (
            f"Some label that is not {IGNORED} must stand after the thought tokens, but row {row} has its last one in "
            f"column {int(last_label[row])} and its last thought token in column {int(run_end[row]) - 1}. Label the "
            "response that the thoughts are for."
        )
    if name == "turns":
        row = first(begins.sum(1) > 1)
        return (
            f"The labels of a row must form one run, before which the thoughts stand, but those of row {row} form "
            f"several, which begin in columns {begins[row].nonzero()[:, 0].tolist()}: a conversation with several "
            "supervised turns, while `generate` thinks before the last one. Make one row per turn: "
            "`dataset.map(softcot_peft.split_conversations, batched=True, remove_columns=dataset.column_names)`; or "
            "label one turn alone, or write a run of `thought_token` where the thoughts belong."
        )
    row = first(~prompt.any(1))
    return (
        f"Every row needs a prompt before its thoughts, but row {row} has no attended token there. Set the labels of "
        f"the prompt to {IGNORED}; if the whole text is labelled, train on prompt and completion instead."
    )


def _explain_mask(attention_mask: Tensor) -> str:
    """The message for a mask that holds other values than 0 and 1."""
    row, column = (int(index) for index in (attention_mask != 0).ne(attention_mask).nonzero()[0])
    return (
        f"`attention_mask` must hold 0 and 1 only, got {attention_mask[row, column].item()} in row {row}. Larger "
        "values are those of packed batches, which cannot carry thoughts: turn packing off, and pass the tokenizer's "
        "mask."
    )


def _explain_ids(name: str, input_ids: Tensor, vocabulary: int | None, shared_vocabulary: int | None) -> str:
    """The message for ids that a model has no embedding for."""
    least, most = int(input_ids.min()), int(input_ids.max())
    if name == "vocabulary":
        return (
            f"`input_ids` must lie within the base's vocabulary, 0 to {(vocabulary or 0) - 1}, got {least} to {most}. "
            "Tokenize with the base's tokenizer; padding needs an id of the vocabulary too."
        )
    return (
        f"`assistant_shares_tokenizer` feeds the prompt's ids to the assistant, which has {shared_vocabulary}, "
        f"but `input_ids` hold {most}. Set it to False, so that prompts are decoded and encoded again; if "
        "they were added in memory, call `use_tokenizer(tokenizer)` before the adapter is attached."
    )


def check_unpacked(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Refuse rows whose position ids `(..., L)` start again within their attended part: several sequences in one."""
    if position_ids is None or position_ids.shape[-1] < 2:
        return
    restarts = position_ids[..., 1:] < position_ids[..., :-1]
    if attention_mask is not None:
        restarts = restarts & (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
    if restarts.any():
        row, column = (int(index) for index in restarts.flatten(0, -2).nonzero()[0])
        raise ValueError(
            f"`position_ids` must rise along each row, but they start again within row {row}, in column {column + 1}: "
            "packed or padding-free batches cannot carry thoughts, since a row has one place for them. Turn `packing` "
            "and `padding_free` off."
        )


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids that count attended tokens, as transformers' `generate` makes them: `(B, L)` to `(B, L)`.

    Padding has the position of the token before it, so that thoughts inserted behind it count on from there.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def trailing(attention_mask: Tensor) -> Tensor:
    """How many columns follow the last attended one, per row: `(B, L)` to `(B,)`."""
    return attention_mask.flip(1).ne(0).int().argmax(1)


def align_left(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Roll every row so that its last attended token comes last, as left padding has it."""
    length = values.shape[1]
    columns = torch.arange(length, device=values.device)
    return take(values, (columns - trailing(attention_mask).to(values.device)[:, None]) % length)


def prompts(input_ids: Tensor, placement: Placement) -> tuple[Tensor, Tensor]:
    """What the assistant may see: the attended tokens before the thoughts.

    Args:
        input_ids: `(B, L)`.
        placement: Where the thoughts stand.

    Returns:
        Ids `(B, P)` and mask `(B, P)` with the prompts' ends in the last column; P is the longest prompt's span.
    """
    start = placement.start.to(input_ids.device)
    columns = torch.arange(-placement.latest, 0, device=input_ids.device) + start[:, None]  # (B, P)
    mask = columns >= 0
    columns = columns.clamp(min=0)
    if placement.attention_mask is not None:
        mask = mask & take(placement.attention_mask, columns).to(mask.device).bool()
    return take(input_ids, columns), mask.long()
