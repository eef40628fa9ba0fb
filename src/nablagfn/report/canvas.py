"""An empty plot, and how it becomes inline SVG (matplotlib).

Text stays text, so that plots are small, and readable to machines.
"""

from __future__ import annotations

import io
import re
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
    """An <svg>, what it shows in a few words, and in a sentence. inner: of losses and gradients,
    which fewer people look at."""

    svg: str
    title: str
    about: str = ""
    inner: bool = False


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
    """The <svg> element, the same for the same plot. Of its ids those that it refers to are kept,
    and begin with `key`, so that a page can hold many."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key}):
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    start = re.sub(r"\W+", "-", key)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{start}-{m[1]}"' if m[1] in used else "", text)
    return re.sub(r'(url\(#|href="#)', rf"\1{start}-", text)
