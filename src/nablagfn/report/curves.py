"""Curves over the training, and over the evaluated checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .canvas import BLUE, Plot, blank, svg_of
from .figures import meaning, title
from .read import ModelRow, Row


@dataclass(frozen=True)
class Curve:
    """A metric of the training, against updates. spread: a metric with its standard deviation."""

    metric: str
    title: str
    log: bool = False
    spread: str = ""


CURVES = (
    Curve("reward", "reward of the training samples", spread="reward_std"),
    Curve("probe_reward", "reward of the fixed-seed samples"),
    Curve("probe_diversity", "diversity of the fixed-seed samples"),
    Curve("probe_diversity_kept", "share of the diversity that is kept"),
    Curve("probe_recognised", "recognised share of the fixed-seed samples"),
    Curve("probe_path_kl", "path KL (nats)"),
    Curve("probe_transport_cost", "transport cost"),
    Curve("probe_drift", "drift from the pretrained model, same seeds"),
    Curve("probe_mmd", "MMD to the pretrained model"),
    Curve("probe_mmd2_ratio", "MMD² to the target, over its floor", log=True),
    Curve("probe_mode_kl", "KL of the mode masses", log=True),
    Curve("loss_forward", "forward loss", log=True),
    Curve("loss_reverse", "reverse loss", log=True),
    Curve("loss_terminal", "terminal loss", log=True),
    Curve("loss_trust", "trust region", log=True),
    Curve("loss_consistency", "consistency loss", log=True),
    Curve("loss_boundary", "boundary loss", log=True),
    Curve("grad_norm", "gradient norm of the LoRA", log=True),
)

INNER = ("loss", "grad_norm")


def curves(rows: Sequence[Row]) -> list[Plot]:
    """What the training logged; held-out rewards after the trained one."""
    held_out = sorted(
        {key for row in rows for key in row if key.startswith("probe_reward_")}
        - {"probe_reward_target"}
    )
    extra = [
        Curve(key, f"{key.removeprefix('probe_reward_')} of the fixed-seed samples")
        for key in held_out
    ]
    panels = (*CURVES[:2], *extra, *CURVES[2:])
    return [plot for plot in (_curve(panel, rows) for panel in panels) if plot]


def _curve(curve: Curve, rows: Sequence[Row]) -> Plot | None:
    """One metric; None when the run has none of it, or nothing but zeros."""
    seen = [row for row in rows if row.get(curve.metric) is not None]
    updates = [row["update"] for row in seen]
    values = [float(row[curve.metric]) for row in seen]
    if not any(values):
        return None
    with blank(4.6, 2.6) as (canvas, axes):
        axes.plot(updates, values, color=BLUE, marker="o" if len(values) < 30 else "", ms=3)
        banded = bool(curve.spread) and all(row.get(curve.spread) is not None for row in seen)
        if banded:
            low = [v - row[curve.spread] for v, row in zip(values, seen, strict=True)]
            high = [v + row[curve.spread] for v, row in zip(values, seen, strict=True)]
            axes.fill_between(updates, low, high, color=BLUE, alpha=0.14, lw=0)
        if curve.log and min(values) > 0:
            axes.set_yscale("log")
        band = "band: one standard deviation of the epoch's samples" if banded else ""
        inner = curve.metric.startswith(INNER)
        return Plot(svg_of(canvas, curve.metric), curve.title, band, inner)


def evaluated_curves(models: Sequence[ModelRow], confidence: float) -> list[Plot]:
    """Each figure of `nablagfn evaluate` over the checkpoints, with its interval."""
    keys = list(dict.fromkeys(key for model in models for key in model.figures))
    found = []
    for key in keys:
        points = [(model.update, model.figures[key]) for model in models if key in model.figures]
        with blank(4.6, 2.6) as (canvas, axes):
            updates = [update for update, _ in points]
            values = [figure.value for _, figure in points]
            axes.plot(updates, values, color=BLUE, marker="o", ms=4)
            banded = [
                (u, f.low, f.high) for u, f in points if f.low is not None and f.high is not None
            ]
            if banded:
                at, low, high = zip(*banded, strict=True)
                axes.fill_between(at, low, high, color=BLUE, alpha=0.16, lw=0)
            about = meaning(key) + (f"; band: {confidence:.0%} interval" if banded else "")
            found.append(Plot(svg_of(canvas, f"evaluated {key}"), title(key), about))
    return found
