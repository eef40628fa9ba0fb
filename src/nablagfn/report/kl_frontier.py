"""Mean reward against path KL, under the best reward that any sampler can have for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .canvas import BLUE, GREY, Plot, blank, svg_of
from .frontier import COLOURS

SIZE = (6.2, 4.0)  # inches
X_LABEL = "KL from the pretrained model (nats)"
LINEAR = 1.0  # nats, below which the axis is linear: 0 must be on it


class Known(Protocol):
    """A value with the ends of its interval, as `FigureRow` and `Interval` have them."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


class BestPoint(Protocol):
    """The target at one β, as `FrontierPoint` has it."""

    @property
    def kl(self) -> Any: ...
    @property
    def reward(self) -> Any: ...


@dataclass(frozen=True)
class Spent:
    """A finetuned model: the KL it spent, and its mean reward."""

    kl: Known
    reward: Known
    label: str
    group: str = ""


def save_frontier(best: Sequence[BestPoint], path: Path) -> None:
    """The frontier alone, as PNG; nothing without one."""
    if best:
        with blank(*SIZE, X_LABEL) as (canvas, axes):
            _best(axes, best)
            axes.set_xlim(left=0)
            axes.legend(frameon=False, loc="lower right")
            canvas.savefig(path, dpi=120)


def kl_frontier(best: Sequence[BestPoint], models: Sequence[Spent], key: str = "kl") -> Plot | None:
    """Models under the frontier: those of one group are joined; None without models."""
    if not models:
        return None
    with blank(*SIZE, X_LABEL) as (canvas, axes):
        draw(axes, best, models)
        canvas.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        return Plot(svg_of(canvas, key), "reward for the KL spent, under the best there is")


def kl_by_step(nats: Sequence[float], times: Sequence[float]) -> Plot:
    """The path KL of each step, noisiest first. times: of the steps, where they are known."""
    with blank(*SIZE, "step, noisiest first") as (canvas, axes):
        axes.bar(range(len(nats)), nats, color=BLUE)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_ylabel("KL (nats)")
        most = max(range(len(nats)), key=nats.__getitem__)
        share = nats[most] / max(sum(nats), 1e-300)
        when = f", time {times[most]:g}" if most < len(times) else ""
        about = f"step {most} of {len(nats)}{when} spends most: {share:.0%}"
        return Plot(svg_of(canvas, "steps"), "path KL by step", about)


def draw(axes: Axes, best: Sequence[BestPoint], models: Sequence[Spent]) -> None:
    """The frontier and the models on an axis that is linear up to 1 nat, and logarithmic beyond."""
    if best:
        _best(axes, best)
    groups = list(dict.fromkeys(model.group for model in models))
    for i, group in enumerate(groups):
        own = [model for model in models if model.group == group]
        colour = COLOURS[i % len(COLOURS)]
        x, y = [m.kl.value for m in own], [m.reward.value for m in own]
        axes.plot(x, y, color=colour, lw=1, alpha=0.5)
        axes.plot(x, y, "o", color=colour, ms=5, mec="white", mew=0.6, label=group or None)
        for model in own:
            _bars(axes, model, colour)
            axes.annotate(
                model.label,
                (model.kl.value, model.reward.value),
                xytext=(5, 3),
                textcoords="offset points",
                fontsize=7,
                color="#3b4350",
            )
    farthest = max((point.kl.value for point in (*best, *models)), default=LINEAR)
    wide = farthest > 10 * LINEAR
    if wide:
        axes.set_xscale("symlog", linthresh=LINEAR)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, position: f"{x:g}"))
    axes.set_xlim(0, farthest * (1.8 if wide else 1.08))


def _best(axes: Axes, best: Sequence[BestPoint]) -> None:
    """The line, its band, and the part of the plane that no sampler reaches."""
    x, y = [p.kl.value for p in best], [p.reward.value for p in best]
    low = [p.reward.value if p.reward.low is None else p.reward.low for p in best]
    high = [p.reward.value if p.reward.high is None else p.reward.high for p in best]
    axes.fill_between(x, low, high, color=BLUE, alpha=0.15, lw=0)
    axes.plot(x, y, color=BLUE, lw=2, label="best possible (95% interval)")
    axes.axhline(y[0], color=GREY, lw=0.8, ls=":", label="pretrained model")
    axes.set_ylabel("mean reward")


def _bars(axes: Axes, model: Spent, colour: str) -> None:
    """Its intervals, of which a value may lie outside."""
    kl, reward = model.kl, model.reward
    if kl.low is not None and kl.high is not None:
        axes.plot([kl.low, kl.high], [reward.value, reward.value], color=colour, lw=0.8)
    if reward.low is not None and reward.high is not None:
        axes.plot([kl.value, kl.value], [reward.low, reward.high], color=colour, lw=0.8)
