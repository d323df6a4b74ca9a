"""Plots the losses of a training run, from the log of `Trainer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SERIES = {"loss": ("training", "#0072B2", None), "eval_loss": ("validation", "#D55E00", "o")}


def save_loss_plot(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot training and validation loss over the steps, and save the figure; without matplotlib, say so.

    Args:
        history: `trainer.state.log_history`.
        path: File of the figure; its suffix is the format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"No {path.name}: matplotlib is not installed (`pip install matplotlib`)")
        return
    figure = Figure(figsize=(6, 3.5), dpi=110, layout="constrained")
    axis = figure.subplots()
    for key, (name, colour, marker) in SERIES.items():
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=name)
    axis.set(xlabel="step", ylabel="loss per token, nats")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path)
    print(f"Losses: {path}")
