"""An empty plot, and how it becomes inline SVG (matplotlib).

Text stays text, so that plots are small, and readable to machines.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

BLUE, GREY = "#2456a6", "#8a93a3"
UPDATE = "update"
STYLE: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}


@dataclass(frozen=True)
class Plot:
    """An <svg>, what it shows in a few words, and in a sentence."""

    svg: str
    title: str
    about: str = ""


@contextmanager
def blank(width: float, height: float, x_label: str = UPDATE) -> Iterator[tuple[Canvas, Axes]]:
    """A figure with one panel, in inches."""
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        axes = canvas.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(x_label)
        if x_label == UPDATE:
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        yield canvas, axes


def svg_of(canvas: Canvas, key: str) -> str:
    """The <svg> element; the same for the same plot, its ids made from `key`."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key}):
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
