"""Plots show the numbers that they are given, on any axes, without a display and without pyplot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from project_files import process_environment

from softcot_peft.analysis import plot_attention, plot_nearest_tokens, plot_similarity, thought_similarity

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

SIMILARITY = torch.tensor([[1.0, 0.5, -0.04], [0.5, 1.0, -0.001], [-0.04, -0.001, 1.0]])
TOKENS = [[["2", "7"], ["+", "$x$"]], [["\n", "Ġmuch_too_long"], ["*", "_"]]]
SCORED = [[[(token, 0.9 - rank / 2) for rank, token in enumerate(r)] for r in q] for q in TOKENS]
SHARES = torch.tensor([[0.1, 0.25, 0.0], [0.5, 0.0, 1.0]])
HEADS = torch.rand(2, 4, 3)


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def ticks(ax: Axes) -> tuple[list[str], list[str]]:
    return tuple([label.get_text() for label in axis.get_ticklabels()] for axis in (ax.yaxis, ax.xaxis))


def names(ax: Axes) -> tuple[str, str, str]:
    return ax.get_title(), ax.get_ylabel(), ax.get_xlabel()


PLOTS: dict[str, tuple[Any, ...]] = {
    "questions": (plot_similarity, SIMILARITY),
    "positions": (plot_similarity, SIMILARITY, "positions"),
    "tokens": (plot_nearest_tokens, TOKENS),
    "scored": (plot_nearest_tokens, SCORED, 1),
    "all": (plot_nearest_tokens, SCORED, None),
    "layers": (plot_attention, SHARES),
    "heads": (plot_attention, HEADS),
}


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_has_a_title_and_axes_with_names_and_is_shown_by_notebooks(name: str, tmp_path: Path) -> None:
    plot, *given = PLOTS[name]
    ax = plot(*given)
    assert isinstance(ax, Axes)
    assert all(names(ax))
    assert ax.figure._repr_png_().startswith(b"\x89PNG")
    bars = [other.get_ylabel() for other in ax.figure.axes if other is not ax]
    assert bars == [] if name == "tokens" else bars[0] in ("cosine similarity", "share of attention, %")
    ax.figure.savefig(tmp_path / "plot.svg")
    ax.figure.savefig(tmp_path / "plot.pdf")


@pytest.mark.parametrize("name", PLOTS)
def test_plots_draw_on_the_axes_that_they_are_given(name: str) -> None:
    plot, *given = PLOTS[name]
    figure = Figure(layout="constrained")
    left, right = figure.subplots(1, 2)
    assert plot(*given, ax=right) is right
    assert right.images
    assert not left.images
    figure.draw_without_rendering()


def test_similarities_are_written_and_coloured() -> None:
    ax = plot_similarity(SIMILARITY)
    assert texts(ax) == ["1.00", "0.50", "-0.04", "0.50", "1.00", "0.00", "-0.04", "0.00", "1.00"]
    (image,) = ax.images
    assert image.get_clim() == (-0.1, 1.0)
    assert torch.equal(torch.tensor(image.get_array()), SIMILARITY)
    assert names(ax) == ("Similarity of thoughts between questions", "question", "question")
    assert ticks(ax) == (["0", "1", "2"], ["0", "1", "2"])
    ax = plot_similarity(SIMILARITY.abs().bfloat16(), "positions", labels=["a", "b", "$c_d"])
    assert ax.images[0].get_clim() == (0.0, 1.0)
    assert names(ax) == ("Similarity of thoughts within a question", *["thought position"] * 2)
    assert ticks(ax) == (["a", "b", "$c_d"],) * 2


def test_large_matrices_are_coloured_without_numbers() -> None:
    ax = plot_similarity(thought_similarity(torch.randn(100, 4, 8)))
    assert texts(ax) == []
    assert len(ticks(ax)[0]) == len(ticks(ax)[1]) == 20
    width, height = ax.figure.get_size_inches()
    assert width < 12
    assert height < 12


def test_plots_of_diverged_or_trained_tensors_are_drawn() -> None:
    broken = SIMILARITY.clone()
    broken[0, 1] = float("nan")
    ax = plot_similarity(broken.requires_grad_())
    assert ax.images[0].get_clim() == (-0.1, 1.0)
    assert texts(ax)[1] == "nan"
    ax.figure.draw_without_rendering()
    plot_attention(torch.full((2, 3), float("nan"))).figure.draw_without_rendering()


def test_tables_of_many_thoughts_have_room_for_their_tokens() -> None:
    ax = plot_nearest_tokens([[["word"] * 3] * 32] * 40, None)
    assert len(texts(ax)) == 32 * 40
    width, height = ax.figure.get_size_inches()
    assert width / 32 > 0.5
    assert height / 40 > 0.3
    assert len(ticks(ax)[0]) == 40


def test_tokens_are_written_as_they_are() -> None:
    assert texts(plot_nearest_tokens(TOKENS)) == ["2", "7", "+", "$x$"]
    ax = plot_nearest_tokens(SCORED, 1)
    assert texts(ax) == ["\\n", "Ġmuch_too…", "*", "_"]
    assert names(ax) == ("Nearest tokens, question 1", "thought position", "rank")
    torch.testing.assert_close(torch.tensor(ax.images[0].get_array()), torch.tensor([[0.9, 0.4]] * 2))
    ax = plot_nearest_tokens(SCORED, None)
    assert texts(ax) == ["2", "+", "\\n", "*"]
    assert names(ax)[1:] == ("question", "thought position")
    with pytest.raises(IndexError):
        plot_nearest_tokens(SCORED, 2)


def test_attention_is_in_percent() -> None:
    ax = plot_attention(SHARES, ["A", "$2", "+"])
    assert texts(ax) == ["10", "25", "0", "50", "0", "100"]
    assert ticks(ax) == (["0", "1"], ["A", "$2", "+"])
    assert ax.images[0].get_clim() == (0, 100)
    ax = plot_attention(HEADS)
    torch.testing.assert_close(torch.tensor(ax.images[0].get_array()), 100 * HEADS.mean(-1))
    assert names(ax)[1:] == ("layer", "head (mean over later tokens)")
    plot_attention(torch.zeros(2, 3)).figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("plot", "given", "message"),
    [
        (plot_similarity, (torch.zeros(2, 3),), r"`similarity` must be a square matrix, got the shape \(2, 3\)"),
        (plot_similarity, (torch.zeros(0, 0),), r"`similarity` must be a square matrix, got the shape \(0, 0\)"),
        (plot_similarity, (torch.zeros(2, 2), "layers"), "`between` must be 'questions' or 'positions', got 'layers'"),
        (plot_attention, (torch.zeros(3),), r"`shares` must be \(layers, T\) or .* got \(3,\)"),
        (plot_attention, (torch.zeros(3, 0),), r"with a later token, got \(3, 0\)"),
        (plot_attention, (torch.zeros(3, 2), ["a"]), r"`tokens` must be 2 strings, got \['a'\]"),
        (plot_attention, (torch.zeros(3, 2), "ab"), "`tokens` must be 2 strings, got 'ab'"),
        (plot_attention, (torch.zeros(3, 2, 2), ["a", "b"]), "`tokens` must be None for shares of heads"),
    ],
)
def test_what_cannot_be_plotted_is_refused(plot: Any, given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot(*given)


def test_labels_must_be_as_many_as_rows() -> None:
    with pytest.raises(ValueError, match="`labels` must be 3 strings"):
        plot_similarity(SIMILARITY, labels=["a"])


_PLOT = """
import sys
import torch
from softcot_peft.analysis import plot_similarity
print("matplotlib" in sys.modules)
plot_similarity(torch.eye(2)).figure.savefig("plot.png")
print("matplotlib.pyplot" in sys.modules)
"""
_NONE = """
import sys
sys.modules["matplotlib"] = None
import torch
from softcot_peft.analysis import plot_similarity, thought_similarity
similarity = thought_similarity(torch.randn(2, 4, 8))
try:
    plot_similarity(similarity)
except ImportError as error:
    print(error)
"""


def printed(code: str, folder: Path) -> str:
    command = [sys.executable, "-c", code]
    environment = process_environment()
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=environment).stdout


def test_matplotlib_is_imported_for_plots_alone_and_pyplot_never(tmp_path: Path) -> None:
    assert printed(_PLOT, tmp_path).split() == ["False", "False"]
    assert (tmp_path / "plot.png").exists()
    message = "matplotlib must be installed to draw plots, but is not. Run `pip install softcot-peft[plots]`.\n"
    assert printed(_NONE, tmp_path) == message
