"""Curves as inline SVG (matplotlib)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Curve:
    """One panel: which metric, and what to call it."""

    metric: str
    title: str
    log: bool = False
    spread: str = ""  # metric with the standard deviation, drawn as a band


PANELS = (
    Curve("reward", "reward of the training samples", spread="reward_std"),
    Curve("probe_diversity", "diversity of the fixed-seed samples"),
    Curve("probe_recognised", "recognised share of the fixed-seed samples"),
    Curve("loss_forward", "forward loss", log=True),
    Curve("loss_reverse", "reverse loss", log=True),
    Curve("loss_terminal", "terminal loss", log=True),
    Curve("loss_trust", "trust region", log=True),
    Curve("grad_norm", "gradient norm of the LoRA", log=True),
)


def draw(curve: Curve, rows: Rows) -> str:
    """An <svg> of one metric against updates; empty when the run has none of it."""
    points = [
        (row["update"], row[curve.metric]) for row in rows if row.get(curve.metric) is not None
    ]
    if not any(value for _, value in points):
        return ""
    updates, values = zip(*points, strict=True)
    figure, axes = plt.subplots(figsize=(4.6, 2.8), layout="constrained")
    axes.plot(updates, values, color="#2456a6", marker="o" if len(points) < 12 else "", ms=3)
    if curve.spread:
        spread = [row[curve.spread] for row in rows]
        low = [v - s for v, s in zip(values, spread, strict=True)]
        high = [v + s for v, s in zip(values, spread, strict=True)]
        axes.fill_between(updates, low, high, color="#2456a6", alpha=0.15, lw=0)
    if curve.log and min(values) > 0:
        axes.set_yscale("log")
    axes.set_title(curve.title, fontsize=10)
    axes.set_xlabel("update", fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": curve.metric}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
