"""The pure tensor functions against the same thing written with lists, on random shapes."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    Placement,
    align_left,
    insert,
    insert_positions,
    locate,
    positions,
    prompts,
    restore,
    restore_keys,
    take,
    trailing,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_outputs import CausalLMOutputWithPast


@st.composite
def rows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids `(B, L)`, a start per row and N."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    start = draw(st.lists(st.integers(1, length), min_size=batch, max_size=batch))
    return torch.arange(1, batch * length + 1).view(batch, length), torch.tensor(start), draw(st.integers(1, 5))


def with_list(row: list, start: int, middle: list) -> list:
    return row[:start] + middle + row[start:]


@given(rows())
def test_insert_is_list_insertion(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    ids, start, num = case
    want = [with_list(row, at, [-7] * num) for row, at in zip(ids.tolist(), start.tolist(), strict=True)]
    assert insert(ids, start, num, -7).tolist() == want
    embeddings = ids[..., None] * torch.tensor([1.0, -1.0])
    thoughts = torch.randn(len(ids), num, 2)
    placed = insert(embeddings, start, num, thoughts)
    for row, at in enumerate(start.tolist()):
        assert torch.equal(placed[row, at : at + num], thoughts[row])
        assert torch.equal(torch.cat([placed[row, :at], placed[row, at + num :]]), embeddings[row])


@given(rows())
def test_inserted_positions_go_on_counting(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    ids, start, num = case
    length = ids.shape[1]
    counted = torch.arange(3, length + 3)[None]
    assert insert_positions(counted, start, num).tolist() == [list(range(3, length + num + 3))] * len(ids)
    several = insert_positions(counted.expand(3, len(ids), -1), start, num)  # multimodal rotary embeddings have three
    assert several.shape == (3, len(ids), length + num)


@given(rows())
def test_restore_undoes_insert_row_by_row(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    ids, start, num = case
    batch, length = ids.shape
    placed = length + num
    logits = torch.arange(batch * placed).view(batch, placed, 1).expand(-1, -1, 3).float()
    attention = torch.arange(batch * placed * placed).view(batch, 1, placed, placed).float()
    output = CausalLMOutputWithPast(
        loss=torch.tensor(1.0), logits=logits, hidden_states=(logits * 2,), attentions=(attention,)
    )
    restored = restore(output, start, num, length)
    assert restored.loss == 1.0
    for row, at in enumerate(start.tolist()):
        # the row of the last prompt token is the row of the last thought
        kept = [*range(at - 1), at + num - 1, *range(at + num, placed)]
        keys = [*range(at), *range(at + num, placed)]
        assert torch.equal(restored.logits[row], logits[row, kept])
        assert torch.equal(restored.hidden_states[0][row], 2 * logits[row, kept])
        assert torch.equal(restored.attentions[0][row, 0], attention[row, 0][kept][:, keys])
        shifted = restore({"log_probs": logits[:, :-1, 0]}, start, num, length)["log_probs"]
        assert torch.equal(shifted[row], logits[row, kept[:-1], 0])
        for streams in (batch, batch + 1):  # as many as rows, too
            stacked = torch.stack([logits * stream for stream in range(streams)])
            unstacked = restore({"hidden_states": (stacked,)}, start, num, length)["hidden_states"][0]
            assert torch.equal(unstacked[-1, row], (streams - 1) * logits[row, kept])
        routed = restore((logits.flatten(0, 1),), start, num, length)[0].view(batch, length, 3)
        assert torch.equal(routed[row], logits[row, kept])


@given(rows(), st.data())
def test_slices_do_what_an_index_does(case: tuple[torch.Tensor, torch.Tensor, int], data: st.DataObject) -> None:
    ids, _, num = case
    batch, length = ids.shape
    column = data.draw(st.integers(1, length))
    start = torch.full((batch,), column)
    assert torch.equal(insert(ids, start, num, -7, column), insert(ids, start, num, -7))
    thoughts, embeddings = torch.randn(batch, num, 2), torch.randn(batch, length, 2)
    assert torch.equal(insert(embeddings, start, num, thoughts, column), insert(embeddings, start, num, thoughts))
    placed = length + num
    output = {
        "logits": torch.randn(batch, placed, 3),
        "log_probs": torch.randn(batch, placed - 1),
        "attentions": (torch.randn(batch, 2, placed, placed),),
        "hidden_states": (torch.randn(4, batch, placed, 2),),
        "router_logits": (torch.randn(batch * placed, 2),),
    }
    sliced, picked = restore(output, start, num, length, column=column), restore(output, start, num, length)
    for name, value in picked.items():
        torch.testing.assert_close(sliced[name], value, rtol=0, atol=0)


@given(rows(), st.integers(0, 4))
def test_restored_keys_lack_the_thoughts(case: tuple[torch.Tensor, torch.Tensor, int], later: int) -> None:
    ids, start, num = case
    total = ids.shape[1] + num + later
    attention = torch.arange(total).expand(len(ids), 2, 1, total)
    restored = restore_keys((attention,), start, num)[0]
    for row, at in enumerate(start.tolist()):
        assert restored[row, 1, 0].tolist() == [*range(at), *range(at + num, total)]


@given(rows(), st.data())
def test_prompts_are_what_is_attended_before_the_thoughts(
    case: tuple[torch.Tensor, torch.Tensor, int], data: st.DataObject
) -> None:
    ids, start, num = case
    length = ids.shape[1]
    left = [data.draw(st.integers(0, at - 1)) for at in start.tolist()]
    mask = (torch.arange(length) >= torch.tensor(left)[:, None]).long()
    placement = Placement(start, num, True, mask, True, int(start.max()), int(start.min()))
    prompt, prompt_mask = prompts(ids, placement)
    assert prompt.shape == prompt_mask.shape == (len(ids), int(start.max()))
    for row, (first, at) in enumerate(zip(left, start.tolist(), strict=True)):
        assert prompt[row][prompt_mask[row].bool()].tolist() == ids[row, first:at].tolist()
        assert prompt_mask[row, -1] == 1


@given(rows())
def test_aligned_rows_end_in_the_last_column(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    ids, start, _ = case
    mask = (torch.arange(ids.shape[1]) < start[:, None]).long()  # right padding
    assert trailing(mask).tolist() == (ids.shape[1] - start).tolist()
    for row, at in enumerate(start.tolist()):
        assert align_left(ids, mask)[row, -at:].tolist() == ids[row, :at].tolist()
    aligned = align_left(mask, mask)
    assert aligned[:, -1].all()
    assert positions(aligned)[:, -1].tolist() == (start - 1).tolist()


@given(rows(), st.data())
def test_locate_is_the_first_label_or_the_end(
    case: tuple[torch.Tensor, torch.Tensor, int], data: st.DataObject
) -> None:
    ids, _, num = case
    batch, length = ids.shape
    padding = [data.draw(st.integers(0, length - 1), label="padding") for _ in range(batch)]
    labelled = [
        [False]
        + data.draw(st.lists(st.booleans(), min_size=length - 1 - pad, max_size=length - 1 - pad))
        + [False] * pad
        for pad in padding
    ]
    mask = torch.tensor([[1] * (length - pad) + [0] * pad for pad in padding])
    labels = torch.where(torch.tensor(labelled), ids, -100)
    given = None if not any(padding) and data.draw(st.booleans(), label="no mask") else mask
    if any(sum(now and not before for before, now in zip([False, *row], row, strict=False)) > 1 for row in labelled):
        with pytest.raises(ValueError, match="several"):
            locate(ids, given, labels, num)
        return
    placement = locate(ids, given, labels, num)
    ends = [length - pad for pad in padding]
    assert placement.start.tolist() == [
        row.index(True) if any(row) else end for row, end in zip(labelled, ends, strict=True)
    ]
    assert (placement.num_thoughts, placement.inserted, placement.padded) == (num, True, any(padding))
    assert (placement.earliest, placement.latest) == (int(placement.start.min()), int(placement.start.max()))
    assert placement.max_span == max(end - start for end, start in zip(ends, placement.start.tolist(), strict=True))


@given(rows(), st.data())
def test_locate_finds_a_run_whatever_is_labelled(
    case: tuple[torch.Tensor, torch.Tensor, int], data: st.DataObject
) -> None:
    ids, start, num = case
    ids = insert(ids, start, num, 0)  # the thought token
    length = ids.shape[1]
    # Labels anywhere but on the run; in a row that has any, one stands behind it.
    labelled = torch.zeros_like(ids, dtype=torch.bool)
    for row, at in enumerate(start.tolist()):
        after = data.draw(st.lists(st.booleans(), min_size=length - at - num, max_size=length - at - num))
        before = data.draw(st.lists(st.booleans(), min_size=at, max_size=at)) if any(after) else [False] * at
        labelled[row] = torch.tensor([*before, *[False] * num, *after])
    placement = locate(ids, None, torch.where(labelled, ids, -100), num + 1, thought_token_id=0)
    assert torch.equal(placement.start, start)
    assert (placement.num_thoughts, placement.inserted) == (num, False)
    assert placement.has_early_labels == any(
        bool(row[:at].any()) for row, at in zip(labelled, start.tolist(), strict=True)
    )


def test_take_picks_columns_of_every_row() -> None:
    values = torch.arange(12).view(2, 3, 2)
    assert take(values, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]
