"""A picture of target and samples side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ..core import rng
from .target import Target

SHOWN = 4_000  # points per panel
PANEL = 3.6  # inches
GREY, BLUE, ORANGE = "#9aa0a6", "#1f5fa8", "#d2601a"


def plane(target: Target) -> tuple[Tensor, tuple[str, str]]:
    """Two orthonormal directions [d, 2] to look along, and their names.

    In the plane the axes. Above: ∇r at the mean of the pretrained model, and the direction across
    it in which the pretrained samples spread most.
    """
    mixture = target.world.mixture
    if mixture.dim == 2:
        return torch.eye(2, dtype=torch.float64), ("x₁", "x₂")
    mean, covariance = mixture.moments()
    first = target.world.reward.gradient(mean[None], target.world.rows([target.prompt]))[0]
    first = first / first.norm()
    across = torch.eye(len(first), dtype=first.dtype) - torch.outer(first, first)
    second = torch.linalg.eigh(across @ covariance @ across).eigenvectors[:, -1]
    return torch.stack([first, second], 1), ("along ∇r", "widest direction across ∇r")


def side_by_side(
    targets: Mapping[str, Target],
    samples: Mapping[str, Tensor],
    figures: Mapping[str, Mapping[str, float]],
    path: Path,
) -> None:
    """Write a PNG: per prompt one row with the target and the samples [B, d], atomically.

    Grey behind both: the pretrained model. Crosses: its modes. figures: by prompt, as `of_prompt`
    gives them, for the titles; may be empty.
    """
    sheet = Figure(figsize=(2 * PANEL, PANEL * len(samples) + 0.5), layout="constrained", dpi=120)
    FigureCanvasAgg(sheet)
    axes = sheet.subplots(len(samples), 2, squeeze=False)
    for (prompt, x), row in zip(samples.items(), axes, strict=True):
        _row(row, targets[prompt], x.detach().cpu().double(), figures.get(prompt, {}))
    world = targets[next(iter(samples))].world
    sheet.suptitle(f"{world.title}, β = {world.beta:g}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial.png")
    sheet.savefig(temporary)
    temporary.replace(path)


def _row(axes: Any, target: Target, x: Tensor, figures: Mapping[str, float]) -> None:
    directions, labels = plane(target)
    count = min(len(x), SHOWN)
    exact = target.resample(count, rng.generator(0, "plot")).double() @ directions
    base = target.base[:SHOWN].double() @ directions
    drawn = x[:count] @ directions
    centres = target.world.mixture.means @ directions
    low, high = _limits(base, exact, drawn)
    panels = ((exact, BLUE, _target_title(target)), (drawn, ORANGE, _title(figures)))
    size, alpha = (3.0, 0.35) if count > 500 else (8.0, 0.7)
    for axis, (points, colour, title) in zip(axes, panels, strict=True):
        axis.scatter(*base.T, s=2, alpha=0.18, color=GREY, linewidths=0, rasterized=True)
        axis.scatter(*points.T, s=size, alpha=alpha, color=colour, linewidths=0, rasterized=True)
        axis.scatter(*centres.T, marker="+", s=45, color="black", linewidths=0.9)
        axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel=labels[0])
        axis.set_aspect("equal", adjustable="box")
        axis.set_title(title, fontsize=8.5)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    many = len(target.world.prompts) > 1
    axes[0].set_ylabel(f"“{target.prompt}”\n{labels[1]}" if many else labels[1])


def _limits(*clouds: Tensor) -> tuple[list[float], list[float]]:
    """Lower and upper corner of a square that holds nearly all points of all clouds."""
    edges = torch.tensor([0.002, 0.998], dtype=torch.float64)
    ends = torch.stack([cloud.quantile(edges, 0) for cloud in clouds])
    low, high = ends[:, 0].min(0).values, ends[:, 1].max(0).values
    middle, half = (low + high) / 2, 0.55 * (high - low).max()
    return (middle - half).tolist(), (middle + half).tolist()


def _target_title(target: Target) -> str:
    return f"target\nE[r] = {target.reward:.3f}"


def _title(figures: Mapping[str, float]) -> str:
    """The samples' figures, as far as they are known."""
    if not figures:
        return "samples\n"
    parts = [f"E[r] = {figures['reward']:.3f}"]
    for name, label in (("mode_kl", "mode KL"), ("gaussian_kl", "KL")):
        if name in figures:
            parts.append(f"{label} {figures[name]:.4f}")
    return "samples\n" + ",  ".join([*parts, f"MMD²/floor {figures['mmd2_ratio']:.1f}"])
