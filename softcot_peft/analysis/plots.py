"""Plots of what the other functions of `analysis` return. matplotlib is imported when the first plot is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .measures import ScoredTokens, Tokens


def plot_similarity(
    similarity: Tensor,
    between: Literal["questions", "positions"] = "questions",
    *,
    labels: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the similarities of thoughts as a heat map.

    The colours start at 0, or below if there are negative similarities.

    Example:
        ```python
        from softcot_peft.analysis import collect_thoughts, plot_similarity, thought_similarity

        thoughts = collect_thoughts(model, tokenizer, prompts)
        ax = plot_similarity(thought_similarity(thoughts))  # bright everywhere: the thoughts have collapsed
        ax.figure.savefig("questions.png")  # in a notebook, `ax.figure` as a cell's last line shows the plot
        plot_similarity(thought_similarity(thoughts, "positions"), "positions").figure.savefig("positions.png")
        ```

    Args:
        similarity: `(Q, Q)` or `(N, N)`, from [`thought_similarity`].
        between: What rows and columns are, as for [`thought_similarity`].
        labels: Names of rows and columns. `None`: their numbers, from 0.
        ax: Axes to draw on. `None`: those of a new figure, which pyplot does not know.

    Returns:
        The axes; `.figure` is their figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `similarity` is not a square matrix, or the number of labels differs from that of rows.
    """
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1] or not len(similarity):
        raise ValueError(f"`similarity` must be a square matrix, got the shape {tuple(similarity.shape)}.")
    kinds = {"questions": ("question", "between questions"), "positions": ("thought position", "within a question")}
    if between not in kinds:
        raise ValueError(f"`between` must be 'questions' or 'positions', got {between!r}.")
    kind, where = kinds[between]
    names = _names(labels, len(similarity), "labels")
    values = similarity.detach().cpu().float()
    ax = _drawing().heat_map(
        values.numpy(),
        ax=ax,
        limits=(min(0.0, math.floor(10 * float(values.nan_to_num(1).min())) / 10), 1.0),
        texts=[[f"{round(value, 2) + 0:.2f}" for value in row] for row in values.tolist()],  # no "-0.00"
        labels=(names, names),
        bar="cosine similarity",
    )
    ax.set(title=f"Similarity of thoughts {where}", xlabel=kind, ylabel=kind)
    return ax


def plot_nearest_tokens(nearest: Tokens | ScoredTokens, question: int | None = 0, *, ax: Axes | None = None) -> Axes:
    """Plot the tokens nearest to each thought as a table, coloured by similarity if it is known.

    Example:
        ```python
        from softcot_peft.analysis import collect_thoughts, nearest_tokens, plot_nearest_tokens

        thoughts = collect_thoughts(model, tokenizer, prompts)
        nearest = nearest_tokens(model, tokenizer, thoughts, similarities=True)
        plot_nearest_tokens(nearest).figure.savefig("first_question.png")
        plot_nearest_tokens(nearest, question=None).figure.savefig("all_questions.png")
        ```

    Args:
        nearest: The result of [`nearest_tokens`], with or without similarities.
        question: The question whose tokens to show by thought position and rank. `None`: the nearest token of each
            thought, by question and thought position.
        ax: Axes to draw on. `None`: those of a new figure, which pyplot does not know.

    Returns:
        The axes; `.figure` is their figure.

    Raises:
        ImportError: matplotlib is not installed.
        IndexError: There is no such question.
    """
    table: list[Any] = [[ranked[0] for ranked in row] for row in nearest] if question is None else [*nearest[question]]
    scored = not isinstance(table[0][0], str)
    ax = _drawing().heat_map(
        torch.tensor([[cell[1] if scored else float("nan") for cell in row] for row in table]).numpy(),
        ax=ax,
        limits=(0, 1),
        texts=[[cell[0] if scored else cell for cell in row] for row in table],
        labels=(None, None),
        bar="cosine similarity" if scored else None,
        cell=(0.75, 0.3),
    )
    if question is None:
        return _labelled(ax, "Nearest token of each thought", "thought position", "question")
    return _labelled(ax, f"Nearest tokens, question {question}", "rank", "thought position")


def plot_attention(shares: Tensor, tokens: Sequence[str] | None = None, *, ax: Axes | None = None) -> Axes:
    """Plot the attention that later tokens pay to the thoughts as a heat map.

    Example:
        ```python
        from softcot_peft.analysis import attention_to_thoughts, plot_attention

        model.get_base_model().set_attn_implementation("eager")  # other implementations return no attentions
        ids = tokenizer(prompts[0] + "<thought>" * 4 + " 28", return_tensors="pt").input_ids
        thought = tokenizer.convert_tokens_to_ids("<thought>")
        shares = attention_to_thoughts(model, ids, thought)
        tokens = tokenizer.convert_ids_to_tokens(ids[0, -shares.shape[-1] :])
        plot_attention(shares, tokens).figure.savefig("layers.png")
        heads = attention_to_thoughts(model, ids, thought, per_head=True)
        plot_attention(heads).figure.savefig("heads.png")
        ```

    Args:
        shares: `(layers, T)` from [`attention_to_thoughts`]: shown by layer and token. With `per_head`,
            `(layers, heads, T)`: averaged over tokens, and shown by layer and head.
        tokens: The T later tokens. `None`: their numbers, from 0. Not for shares of heads.
        ax: Axes to draw on. `None`: those of a new figure, which pyplot does not know.

    Returns:
        The axes; `.figure` is their figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `shares` has another shape, there are no later tokens, or the number of tokens is not T.
    """
    if shares.dim() not in (2, 3) or 0 in shares.shape:
        raise ValueError(
            f"`shares` must be (layers, T) or (layers, heads, T), with a later token, got {tuple(shares.shape)}."
        )
    heads = shares.dim() == 3
    if heads and tokens is not None:
        raise ValueError("`tokens` must be None for shares of heads, which are averaged over tokens.")
    values = 100 * (shares.mean(-1) if heads else shares).detach().cpu().float()
    ax = _drawing().heat_map(
        values.numpy(),
        ax=ax,
        limits=(0, max(float(values.nan_to_num(0).max()), 1e-6)),
        texts=[[f"{value:.0f}" for value in row] for row in values.tolist()],
        labels=(None, _names(tokens, shares.shape[-1], "tokens")),
        bar="share of attention, %",
    )
    if heads:
        return _labelled(ax, "Attention to the thoughts", "head (mean over later tokens)", "layer")
    return _labelled(ax, "Attention to the thoughts", "later token", "layer")


def _drawing() -> ModuleType:
    """Return the module that draws, which imports matplotlib."""
    try:
        from . import drawing
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "matplotlib must be installed to draw plots, but is not. Run `pip install softcot-peft[plots]`.",
            name="matplotlib",
        ) from error
    return drawing


def _labelled(ax: Axes, title: str, xlabel: str, ylabel: str) -> Axes:
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return ax


def _names(names: Sequence[str] | None, count: int, what: str) -> list[str] | None:
    """Check the number of names."""
    if names is None:
        return None
    if isinstance(names, str) or len(names) != count:
        raise ValueError(f"`{what}` must be {count} strings, got {names!r}.")
    return list(names)
