"""docs/images/flow_samplers.png: sampled densities side by side, and the masses of their modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from nablagfn.worlds.measures import mode_masses
from nablagfn.worlds.protocols import PointModel

matplotlib.use("agg")
from matplotlib import pyplot as plt

SIDE, BINS = 3.0, 150
COLOURS = ("0.25", "#2456a6", "#d1622b", "#3a8f5c", "#b0802a")


@dataclass(frozen=True, eq=False)
class Panel:
    """x: [n, 2] samples. reward: E[r]. masses: of their modes [K], where they are known better."""

    title: str
    x: Tensor
    reward: float
    masses: Tensor | None


def density(x: Tensor) -> Tensor:
    """[BINS, BINS] of samples, smoothed by a Gaussian of two bins, relative to its peak."""
    edges = [torch.linspace(-SIDE, SIDE, BINS + 1, dtype=torch.float64)] * 2
    counts = torch.histogramdd(x.double().cpu(), edges).hist.T
    taps = torch.arange(-6, 7, dtype=torch.float64)
    kernel = (-taps.square() / 8).exp()
    kernel = kernel / kernel.sum()
    blurred = torch.nn.functional.conv2d(
        counts[None, None], kernel[None, None, :, None], padding=(6, 0)
    )
    blurred = torch.nn.functional.conv2d(blurred, kernel[None, None, None, :], padding=(0, 6))[0, 0]
    return blurred / len(x)


def draw_panels(panels: Sequence[Panel], mixture: PointModel, path: Path) -> None:
    figure = plt.figure(figsize=(3.1 * len(panels), 5.6), layout="constrained")
    grid = figure.add_gridspec(2, len(panels), height_ratios=(3.1, 2.2))
    maps = [density(panel.x) for panel in panels]
    top = max(float(found.max()) for found in maps)
    for i, (panel, found) in enumerate(zip(panels, maps, strict=True)):
        axis = figure.add_subplot(grid[0, i])
        axis.imshow(
            found.sqrt(),  # so that modes of a hundredth are seen
            origin="lower",
            extent=(-SIDE, SIDE, -SIDE, SIDE),
            cmap="magma_r",
            vmin=0,
            vmax=top**0.5,
        )
        axis.set_title(panel.title, fontsize=9.5, color=COLOURS[i], fontweight="bold")
        axis.text(-0.3, 0, f"E[r] = {panel.reward:.2f}", ha="center", va="center", fontsize=9)
        axis.set(xticks=(-2, 0, 2), yticks=(-2, 0, 2))
        axis.tick_params(labelsize=7, length=2)
    draw_masses(figure.add_subplot(grid[1, :]), panels, mixture)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_masses(axis: plt.Axes, panels: Sequence[Panel], mixture: PointModel) -> None:
    """A group of bars for each mode, which is named by its direction."""
    count, width = len(mixture), 0.8 / len(panels)
    for i, panel in enumerate(panels):
        known = panel.masses
        masses = mode_masses(mixture.mode_of(panel.x.double()), count) if known is None else known
        places = torch.arange(count) + (i - (len(panels) - 1) / 2) * width
        axis.bar(places, 100 * masses, width, color=COLOURS[i], label=panel.title)
    names = [f"{360 * k // count}°" for k in range(count)]
    axis.set_xticks(range(count), names)
    axis.set(
        ylabel="share of samples, %", xlabel="mode, by its direction (the reward points to 0°)"
    )
    axis.set(yscale="log", ylim=(0.02, 100))
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
