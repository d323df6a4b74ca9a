"""Figures, each as two PNG files, for light and dark pages. Independent of the experiments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from .statistics import Share

# Backgrounds are opaque, so a figure stays readable if a page shows the wrong variant.
THEMES = {"light": ("#ffffff", "#1f2328", "#d1d9e0"), "dark": ("#0d1117", "#e6edf3", "#3d444d")}
# Okabe and Ito's colours, which colour-blind readers can distinguish, without black and yellow.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#a6761d")
HIGHLIGHT, ERROR = "#D55E00", "#8c8c8c"
HIGHLIGHTED = ("SoftCoT", "soft thoughts")  # names with these prefixes have their own colour in every figure
Draw = Callable[[Figure], None]
Series = Mapping[str, Share]  # shares by system, control, etc.


def save(draw: Draw, path: Path, size: tuple[float, float]) -> None:
    """Draw once per theme, and save to `path` with the suffixes `-light.png` and `-dark.png`.

    Args:
        draw: Function that draws on a figure.
        path: Folder and name, without a suffix.
        size: Width and height in inches, at 110 pixels per inch.
    """
    for name, (background, text, line) in THEMES.items():
        colours = {
            "figure.facecolor": background,
            "axes.facecolor": background,
            "legend.facecolor": background,
            **dict.fromkeys(
                ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor"), text
            ),
            **dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), line),
        }
        style = {"font.size": 9, "axes.titlesize": 10, "axes.grid": True, "axes.axisbelow": True}
        with mpl.rc_context({**style, **colours, "axes.prop_cycle": mpl.cycler(color=COLOURS)}):
            figure = Figure(figsize=size, dpi=110, layout="constrained")
            draw(figure)
            # no date or version, so equal figures give equal files
            figure.savefig(f"{path}-{name}.png", metadata={"Software": None})


def looks(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return a colour and a marker for each name."""
    others = iter(COLOURS)
    colours = [HIGHLIGHT if name == "SoftCoT" else next(others) for name in names]
    return list(zip(colours, "osD^vP*X", strict=False))


def bars(panels: Mapping[str, Series], label: str = "right answers, %") -> Draw:
    """Horizontal bars with intervals, in panels side by side that share the same names."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, series) in zip(axes, panels.items(), strict=True):
            names = list(series)[::-1]
            means = [100 * series[name].mean for name in names]
            below = [100 * (series[name].mean - series[name].low) for name in names]
            above = [100 * (series[name].high - series[name].mean) for name in names]
            colours = [HIGHLIGHT if name.startswith(HIGHLIGHTED) else COLOURS[0] for name in names]
            axis.barh(names, means, xerr=(below, above), color=colours, ecolor=ERROR, capsize=2)
            axis.set(title=title, xlabel=label, xlim=(0, 104))
            axis.grid(visible=False, axis="y")

    return draw


def lines(series: Mapping[str, Mapping[int, Share]], xlabel: str, logarithmic: bool = False) -> Draw:
    """Shares against a number: one line per name, with its interval as a band. The axis starts at the lowest value."""

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for (name, points), (colour, marker) in zip(series.items(), looks(series), strict=True):
            across, means = list(points), [100 * share.mean for share in points.values()]
            axis.plot(across, means, marker=marker, ms=4, color=colour, label=name)
            low, high = ([100 * getattr(points[x], end) for x in across] for end in ("low", "high"))
            axis.fill_between(across, low, high, alpha=0.15, color=colour, lw=0)
        if logarithmic:
            axis.set_xscale("log")
        ticks = sorted({x for points in series.values() for x in points})
        axis.set_xticks(ticks, [f"{x:,}" for x in ticks])
        axis.minorticks_off()
        lowest = min(100 * share.low for points in series.values() for share in points.values())
        axis.set(xlabel=xlabel, ylabel="right answers, %", ylim=(max(0, lowest - 2), 101))
        figure.legend(loc="outside right upper", frameon=False)

    return draw


def scatter(points: Mapping[str, tuple[Share, Share]], xlabel: str, ylabel: str) -> Draw:
    """One point per name, with both intervals."""

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for (name, (x, y)), marker in zip(points.items(), "osD^vP*X", strict=False):
            spread = [[[100 * (s.mean - s.low)], [100 * (s.high - s.mean)]] for s in (x, y)]
            axis.errorbar(
                100 * x.mean, 100 * y.mean, yerr=spread[1], xerr=spread[0], fmt=marker, capsize=2, label=name
            )
        axis.set(xlabel=xlabel, ylabel=ylabel, xlim=(-4, 104), ylim=(-4, 104))
        figure.legend(loc="outside right upper", frameon=False)

    return draw


def heat(
    values: Sequence[Sequence[float]], rows: Sequence[object], columns: Sequence[object], ylabel: str, xlabel: str
) -> Draw:
    """A table of percentages as a heat map, with the values in the cells."""

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        axis.grid(visible=False)
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                axis.text(
                    column, row, f"{value:.1f}", ha="center", va="center", color="black" if value > 55 else "white"
                )

    return draw


def maps(panels: Mapping[str, Sequence[Sequence[float]]], label: str, xlabel: str, ylabel: str) -> Draw:
    """Matrices of values between -1 and 1 as heat maps, side by side."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, matrix) in zip(axes, panels.items(), strict=True):
            image = axis.imshow(matrix, cmap="cividis", vmin=0, vmax=1)
            axis.grid(visible=False)
            axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        figure.colorbar(image, ax=list(axes), label=label, shrink=0.8)

    return draw
