"""Maps of what was logged by noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .canvas import Plot, blank, svg_of
from .read import Row

LEVELS = {
    "loss_forward": "forward residual",
    "loss_reverse": "reverse residual",
    "loss_terminal": "terminal residual",
    "loss_trust": "trust region",
    "residual_score_sq": "residual score, mean square",
    "guess_sq": "guess, mean square",
    "flow_sq": "flow network, mean square",
    "value_gradient_sq": "value gradient, mean square",
    "cosine": "cosine of residual score and value gradient",
    "value_gradient_snr": "signal to noise of the value gradient",
}
UNSHOWN = {"update", "steps", "count"}


@dataclass(frozen=True)
class LevelRow:
    """One quantity by noise level: values [levels, updates], NaN where nothing was seen."""

    key: str
    updates: list[int]
    steps: list[list[int]]
    values: np.ndarray = field(repr=False)

    @property
    def signed(self) -> bool:
        return bool(np.nanmin(self.values) < 0)


def levels(rows: Sequence[Row]) -> list[Plot]:
    """A small map for each quantity of diagnostics.jsonl that is not zero throughout."""
    if not rows:
        return []
    steps = rows[-1]["steps"]
    same = [row for row in rows if row["steps"] == steps]
    keys = list(dict.fromkeys(key for row in same for key in row if key not in UNSHOWN))
    keys.sort(key=lambda key: list(LEVELS).index(key) if key in LEVELS else len(LEVELS))
    found = []
    for key in keys:
        empty = [None] * len(steps)
        table = [(row.get(key) or empty) for row in same]
        if any(len(column) != len(steps) for column in table):
            continue
        values = np.array(table, dtype=float).T
        if np.isfinite(values).any() and np.nanmax(np.abs(values)) > 0:
            found.append(_map(LevelRow(key, [row["update"] for row in same], steps, values)))
    return found


def _map(level: LevelRow) -> Plot:
    """Updates to the right, noise level upwards (the noisiest at the top)."""
    values, about = level.values, ""
    limits: dict[str, Any] = {}
    if level.signed:
        largest = float(np.nanquantile(np.abs(values), 0.98)) or 1.0
        limits = {"cmap": "RdBu", "vmin": -largest, "vmax": largest}
    else:
        with np.errstate(divide="ignore"):
            values = np.log10(np.where(values > 0, values, np.nan))
        limits, about = {"cmap": "viridis"}, "colour: log₁₀"
    with blank(4.6, 2.2) as (canvas, axes):
        axes.grid(False)
        first, last = level.updates[0], level.updates[-1]
        extent = (first - 0.5, last + 0.5, len(level.steps) - 0.5, -0.5)
        picture = axes.imshow(
            values, aspect="auto", extent=extent, interpolation="nearest", **limits
        )
        axes.set_yticks(range(len(level.steps)), [f"{low}–{high}" for low, high in level.steps])
        axes.set_ylabel("steps")
        canvas.colorbar(picture, ax=axes, pad=0.02)
        name = LEVELS.get(level.key, level.key.replace("_", " "))
        return Plot(svg_of(canvas, f"level {level.key}"), name, about)
