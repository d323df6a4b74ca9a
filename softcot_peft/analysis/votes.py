"""Majority votes over answers, for `analysis`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """Return the most frequent answer (self-consistency, arXiv 2203.11171); of equally frequent ones, the first.

    All votes are equal, as in SoftCoT++ (arXiv 2505.11484) with several samples of each chain.

        >>> from softcot_peft.analysis import majority_vote
        >>> majority_vote(["12", "8", None, "8"])
        '8'
        >>> majority_vote(["12", "8"])
        '12'

    Args:
        answers: The final answers to one question, such as the number that each text ends with. `None` and `""` stand
            for a text without an answer and do not vote.

    Returns:
        The answer, or `None` if there are no votes.

    Raises:
        TypeError: `answers` is a single string, or an answer is neither a string nor `None`.
    """
    if isinstance(answers, str):
        raise TypeError("`answers` must be a list of strings, got str. Put a single answer into a list.")
    for answer in answers:
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"`answers` must be strings or None, got {answer!r}. Convert answers to text.")
    votes = Counter(answer for answer in answers if answer)
    return votes.most_common(1)[0][0] if votes else None  # sorted by count; equal counts stay in order
