"""Plots of a section's points as PNG, by matplotlib, which is an extra."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from cbwcore.bench.results import Outcome, Plot, Point

__all__ = ["available", "draw"]

WIDTH, HEIGHT, DPI = 4.6, 3.4, 110


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(outcome: Outcome, path: Path) -> bool:
    """All plots of a section side by side in one PNG; False where there is nothing to draw."""
    points = [point for row in outcome.rows for point in row.points]
    plots = [plot for plot in outcome.plots if any(point.plot == plot.name for point in points)]
    if not plots:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * len(plots), HEIGHT), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(plots), squeeze=False)[0]
    for axis, plot in zip(axes, plots, strict=True):
        draw_one(axis, plot, [point for point in points if point.plot == plot.name])
    figure.suptitle(outcome.title)
    figure.savefig(path, metadata={"Software": None})
    return True


def draw_one(axis: Any, plot: Plot, points: list[Point]) -> None:
    """Its curves; a logarithmic axis of values only where they differ much."""
    for number, series in enumerate(dict.fromkeys(point.series for point in points)):
        line = sorted((point.x, point.y) for point in points if point.series == series)
        style = "o-" if len(line) > 1 else "*"
        axis.plot(*zip(*line, strict=True), style, color=f"C{number}", label=series, markersize=5)
    ticks = sorted({point.x for point in points})
    if not plot.linear:
        axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
    values = [point.y for point in points]
    if min(values) > 0 and max(values) > 10 * min(values):
        axis.set_yscale("log")
    else:
        axis.set_ylim(0, 1.15 * max(values) or 1)
    axis.set_title(plot.title, fontsize=9)
    axis.set_xlabel(plot.x, fontsize=8)
    axis.set_ylabel(plot.y, fontsize=8)
    axis.grid(True, alpha=0.3)
    axis.legend(fontsize=7)
