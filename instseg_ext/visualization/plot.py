"""Curves over numbers, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Curve", "plot_curves"]


class Curve(NamedTuple):
    """One line of a plot.

    Attributes:
        label: of the legend.
        x: numbers, ascending.
        y: as many.
        colour: as matplotlib names it.
        secondary: drawn thin and dashed, behind the others.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    secondary: bool = False


def plot_curves(
    path: str | Path, curves: Sequence[Curve], *, title: str, x_label: str, y_label: str
) -> None:
    """Write a plot of curves, with a tick at every x that occurs.

    Args:
        path: a PNG, PDF or SVG file.
        curves: see ``Curve``.
        title: above the plot.
        x_label: below it.
        y_label: beside it.

    Raises:
        ValueError: if the suffix of ``path`` is none that matplotlib writes.
    """
    # The objects, not pyplot: that keeps figures alive and picks a backend for the process. And
    # late, because matplotlib takes a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in curves:
        style = (
            {"linewidth": 1, "linestyle": "--", "marker": ".", "zorder": 2}
            if curve.secondary
            else {"linewidth": 2.2, "marker": "o", "markersize": 5, "zorder": 3}
        )
        axes.plot(curve.x, curve.y, label=curve.label, color=curve.colour, **style)
    axes.set_xticks(sorted({x for curve in curves for x in curve.x}))
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
