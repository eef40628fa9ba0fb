"""Reward against diversity: the checkpoints of a run, or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from .canvas import BLUE, GREY, Plot, blank, svg_of
from .read import FigureRow

COLOURS = (
    *("#2456a6", "#d1495b", "#2a9d74", "#b8690f", "#7b4bb7", "#0c8599"),
    *("#c2378f", "#5f6b2d", "#8d5524", "#3d4b5c", "#e07a1f", "#6a994e"),
)
MARKERS = "os^Dv<>phd"
NO_SCALE = "*"
KEPT = "diversity kept (% of the pretrained model's)"


@dataclass(frozen=True)
class Point:
    """A model in the plane of gain and diversity kept. label: written beside it."""

    gain: FigureRow
    kept: FigureRow
    label: str
    group: str = ""
    scale: float | None = None


def _bars(figure: FigureRow, factor: float = 1.0) -> Any:
    """Error bars of matplotlib for one point; None where no interval is known."""
    if figure.low is None or figure.high is None:
        return None
    low, high = figure.value - figure.low, figure.high - figure.value
    return [[factor * max(low, 0.0)], [factor * max(high, 0.0)]]


def _place(axes: Axes, point: Point, colour: str, marker: str) -> None:
    axes.errorbar(
        100 * point.kept.value,
        point.gain.value,
        xerr=_bars(point.kept, 100),
        yerr=_bars(point.gain),
        color=colour,
        marker=marker,
        ms=11 if marker == NO_SCALE else 7,
        mec="white",
        mew=0.8,
        elinewidth=1,
        capsize=2,
        zorder=3,
    )
    axes.annotate(
        point.label,
        (100 * point.kept.value, point.gain.value),
        xytext=(6, 4),
        textcoords="offset points",
        fontsize=8,
        color="#3b4350",
    )


def _frontier_axes(axes: Axes) -> None:
    axes.axvline(100, color=GREY, lw=0.8, zorder=1)
    axes.axhline(0, color=GREY, lw=0.8, zorder=1)
    axes.set_ylabel("reward gained (σ of the pretrained model's)")
    axes.margins(0.12)


def checkpoint_frontier(points: Sequence[Point]) -> Plot | None:
    """Gain against diversity along one run, joined in order of training."""
    if len(points) < 2:
        return None
    with blank(5.4, 3.6, KEPT) as (canvas, axes):
        x, y = [100 * p.kept.value for p in points], [p.gain.value for p in points]
        axes.plot(x, y, color=BLUE, lw=1, alpha=0.5)
        for point in points:
            _place(axes, point, BLUE, "o")
        _frontier_axes(axes)
        return Plot(svg_of(canvas, "frontier"), "reward against diversity, by checkpoint")


def run_frontier(points: Sequence[Point]) -> Plot | None:
    """Gain against diversity of several runs: a colour per method, a marker per reward scale."""
    if not points:
        return None
    groups = list(dict.fromkeys(point.group for point in points))
    scales = sorted({point.scale for point in points if point.scale is not None})
    marker = {scale: MARKERS[i % len(MARKERS)] for i, scale in enumerate(scales)}
    with blank(5.4, 4.8, KEPT) as (canvas, axes):
        for i, group in enumerate(groups):
            colour = COLOURS[i % len(COLOURS)]
            own = sorted((p for p in points if p.group == group), key=lambda p: p.scale or 0.0)
            x, y = [100 * p.kept.value for p in own], [p.gain.value for p in own]
            axes.plot(x, y, color=colour, lw=1, alpha=0.45)
            for point in own:
                shape = NO_SCALE if point.scale is None else marker[point.scale]
                _place(axes, point, colour, shape)
            axes.plot([], [], color=colour, lw=3, label=group)
        for scale, shape in marker.items():
            axes.plot([], [], color=GREY, marker=shape, ls="", label=f"β = {scale:g}")
        if any(point.scale is None for point in points):
            axes.plot([], [], color=GREY, marker=NO_SCALE, ms=10, ls="", label="no β")
        _frontier_axes(axes)
        canvas.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        return Plot(svg_of(canvas, "runs"), "reward against diversity, by run")
