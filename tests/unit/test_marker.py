"""The token with the first character of a marker's last occurrence, in the text of any tokenizer."""

from __future__ import annotations

from functools import cache

import pytest
from helpers import find_marker
from hypothesis import given
from hypothesis import strategies as st
from tiny_pair import make_assistant_tokenizer, make_base_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast


def make_pieces_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece models with byte fallback: spaces are letters, one is put first and dropped from the text."""
    pieces = [
        "<unk>",
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcAnswer:?.",
        "▁a",
        "▁An",
        "swer",
        "r:",
    ]
    scores = [(piece, -float(len(pieces) - number)) for number, piece in enumerate(dict.fromkeys(pieces))]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def make_merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with tokens that hold the end of a prompt and the beginning of a marker."""
    tokenizer = make_base_tokenizer()
    tokenizer.add_tokens(["?\n", ".\n\nAn", "e\nAnswer: 4"])
    return tokenizer


MAKERS = {
    "bytes": make_base_tokenizer,
    "words": make_assistant_tokenizer,
    "pieces": make_pieces_tokenizer,
    "merging": make_merging_tokenizer,
}
KINDS = pytest.mark.parametrize("kind", MAKERS)


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return MAKERS[kind]()


def decode(kind: str, ids: list[int]) -> str:
    return tokenizer_of(kind).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def encode(kind: str, text: str) -> list[int]:
    return list(tokenizer_of(kind)(text)["input_ids"])


def slowly(kind: str, ids: list[int], marker: str) -> int | None:
    """The longest prefix whose text ends before the marker."""
    text = decode(kind, ids)
    if marker not in text:
        return None
    before = text[: text.rindex(marker)]
    return max(number for number in range(len(ids)) if before.startswith(decode(kind, ids[:number])))


@pytest.mark.parametrize(
    ("kind", "text", "marker", "before"),
    [
        ("bytes", "How many legs?\nAnswer: 4", "\nAnswer:", "How many legs?"),
        ("bytes", "A?\nAnswer: 4\nB?\nAnswer: 5", "\nAnswer:", "A?\nAnswer: 4\nB?"),
        ("bytes", "How many legs?", "legs", "How many"),  # a token holds the space, too
        ("bytes", "How many legs?", "many", "How"),
        ("bytes", "Wie viel? é😀 4", "😀", "Wie viel? é"),  # of four tokens
        ("bytes", "Wie viel? é😀 4", "é", "Wie viel? "),
        ("bytes", "<|user|>A?<|end|><|assistant|> 4", "<|assistant|>", "<|user|>A?<|end|>"),
        ("bytes", "1 (.*) 2 [a-z]+\n", "(.*)", "1 "),  # a literal text
        ("bytes", "何\n答案 4", "答案", "何\n"),
        ("merging", "How many?\nAnswer: 4", "\nAnswer:", "How many"),
        ("merging", "So.\n\nAnswer: 4", "\nAnswer:", "So"),
        ("merging", "One\nAnswer: 4", "Answer:", "On"),
        ("pieces", "a b\nAnswer: c", "\nAnswer:", "a b"),
        ("pieces", "a 😀\nAnswer: c", "\nAnswer:", "a 😀"),
        ("pieces", "a b? Answer: c", "Answer:", "a b?"),
        ("words", "How many legs? Answer: four", "answer", "[BOS] how many legs?"),
    ],
)
def test_the_token_that_holds_the_first_character(kind: str, text: str, marker: str, before: str) -> None:
    ids = encode(kind, text)
    found = find_marker(tokenizer_of(kind), ids, marker)
    assert decode(kind, ids[:found]) == before
    assert found == slowly(kind, ids, marker)


@KINDS
def test_a_text_without_the_marker_has_none(kind: str) -> None:
    for text in ("", "How many legs?", "answer"):
        assert find_marker(tokenizer_of(kind), encode(kind, text), "\nAnswer:") is None


@KINDS
@pytest.mark.parametrize("marker", ["a", " a", "é", "\n", "\n\nA", "😀", "?", "an"])
@given(data=st.data())
def test_as_by_trying_every_prefix(kind: str, marker: str, data: st.DataObject) -> None:
    text = data.draw(st.text(st.sampled_from("aAn é😀\n?."), max_size=20))
    ids = encode(kind, text)
    assert find_marker(tokenizer_of(kind), ids, marker) == slowly(kind, ids, marker)


@pytest.mark.parametrize("kind", ["bytes", "merging"])
@given(data=st.data())
def test_tokens_that_form_no_text_stay_in_place(kind: str, data: st.DataObject) -> None:
    """Sampled tokens may be parts of characters."""
    ids = data.draw(st.lists(st.integers(0, len(tokenizer_of(kind)) - 1), max_size=12))
    ids += encode(kind, "?\nAnswer:")
    found = find_marker(tokenizer_of(kind), ids, "\nAnswer:")
    assert found is not None
    assert "\nAnswer:" in decode(kind, ids[found:])
    assert "\nAnswer:" not in decode(kind, ids[found + 1 :])
