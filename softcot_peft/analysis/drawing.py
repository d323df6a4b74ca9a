"""Draws heat maps with matplotlib, without pyplot: no display and no global state. Imported by `plots` when needed."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

_COLOURS = "cividis"  # the same for readers with and without colour blindness, and increasing in grey
_MOST_TEXTS = 12  # columns and rows up to which values are written into the cells
_LONGEST = 10  # characters of a token
_MOST_TICKS = 24  # labels on an axis


class ShownFigure(Figure):
    """A figure that notebooks show although pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def heat_map(
    values: NDArray[Any],
    *,
    ax: Axes | None,
    limits: tuple[float, float],
    texts: Sequence[Sequence[str]],
    labels: tuple[list[str] | None, list[str] | None],
    bar: str | None,
    cell: tuple[float, float] | None = None,
) -> Axes:
    """Draw a matrix.

    Args:
        values: `(rows, columns)`; NaN: a white cell.
        ax: Axes to draw on. `None`: those of a new figure.
        limits: Values of the darkest and of the brightest colour.
        texts: What to write into the cells, if there are not too many.
        labels: Names of rows and of columns. `None`: their numbers.
        bar: What the colours mean. `None`: there is no colour bar.
        cell: Width and height of a cell in inches that hold text in any case. `None`: square cells.
    """
    rows, columns = values.shape
    if ax is None:
        width, height = cell or (0.42, 0.42)
        widest, highest = (16, 30) if cell else (8, 8)
        size = (max(2.4, min(columns * width, widest)) + 1.8, max(1.2, min(rows * height, highest)) + 1.0)
        ax = ShownFigure(figsize=size, dpi=110, layout="constrained").subplots()
    norm = Normalize(*limits)
    image = ax.imshow(values, cmap=_COLOURS, norm=norm, aspect="auto" if cell or rows != columns else "equal")
    ax.grid(visible=False)
    for axis, names, count in ((ax.yaxis, labels[0], rows), (ax.xaxis, labels[1], columns)):
        step = 1 if cell else math.ceil(count / _MOST_TICKS)
        shown = [_plain(name) for name in names] if names else [str(number) for number in range(count)]
        axis.set_ticks(range(0, count, step), shown[::step], parse_math=False)
    if labels[1] and max(len(name.strip()) for name in labels[1]) > 3:
        ax.tick_params(axis="x", rotation=90)
    if cell or max(rows, columns) <= _MOST_TEXTS:
        for row, line in enumerate(texts):
            for column, text in enumerate(line):
                red, green, blue, _ = colormaps[_COLOURS](norm(values[row, column]))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.46
                colour = "black" if math.isnan(values[row, column]) or not dark else "white"
                ax.text(
                    column, row, _plain(text), ha="center", va="center", color=colour, fontsize=8, parse_math=False
                )
    if bar:
        ax.figure.colorbar(image, ax=ax, label=bar)
    return ax


def _plain(text: str) -> str:
    """Return a token on one line, shortened."""
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
