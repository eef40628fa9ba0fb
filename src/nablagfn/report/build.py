"""Read a run folder and write its report.html."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from ..config import Config, flatten
from ..runfolder import RunFolder, complete_checkpoints, write_atomic
from .curves import PANELS, draw


@dataclass(frozen=True)
class Figure:
    """One line of the before/after table."""

    name: str
    meaning: str
    before: str
    after: str
    change: str


def build(folder: RunFolder) -> Path:
    """Write RUN/report.html. Raises ConfigError when the folder holds no run."""
    config = folder.config()
    rows = folder.metrics()
    environment = Environment(loader=PackageLoader("nablagfn.report", ""), autoescape=True)
    defaults = flatten(Config())
    html = environment.get_template("report.html.j2").render(
        name=folder.path.name,
        config=config,
        figures=figures(folder.read_json("evaluation.json") or {}),
        pictures=before_after(folder),
        grids=[(grid.stem, data_url(grid)) for grid in sorted(folder.grids.glob("epoch_*.png"))],
        curves=[svg for svg in (draw(curve, rows) for curve in PANELS) if svg],
        settings=[(k, v, v != defaults[k]) for k, v in flatten(config).items()],
        versions=folder.read_json("versions.json") or {},
        updates=rows[-1]["update"] if rows else 0,
        checkpoint=max((p.name for p in complete_checkpoints(folder.checkpoints)), default=""),
        minutes=rows[-1]["seconds"] / 60 if rows else 0.0,
    )
    write_atomic(folder.report, html)
    return folder.report


def data_url(picture: Path) -> str:
    """A PNG file as a data: URL."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def before_after(folder: RunFolder) -> list[tuple[str, str]]:
    """The same-seed grids (title, data URL) that the run has."""
    titles = {"before": "before: the pretrained model", "after": "after: finetuned"}
    found = [(title, folder.grids / f"{name}.png") for name, title in titles.items()]
    return [(title, data_url(path)) for title, path in found if path.is_file()]


def figures(evaluation: dict[str, dict[str, Any]]) -> list[Figure]:
    """The before/after table; empty until both were measured."""
    if not {"before", "after"} <= evaluation.keys():
        return []
    before, after = evaluation["before"], evaluation["after"]
    deviation = before["reward_std"] or 1.0
    gain = (after["reward_mean"] - before["reward_mean"]) / deviation
    table = [
        Figure(
            "reward",
            "mean; the change in standard deviations of the pretrained model's rewards",
            f"{before['reward_mean']:.3f}",
            f"{after['reward_mean']:.3f}",
            f"{gain:+.2f} σ",
        ),
        Figure(
            "diversity",
            "mean pairwise feature distance between pictures of one prompt",
            f"{before['diversity']:.3f}",
            f"{after['diversity']:.3f}",
            f"{after['diversity'] / (before['diversity'] or 1.0):.0%} kept",
        ),
    ]
    if before["recognised"] is not None and after["recognised"] is not None:
        points = 100 * (after["recognised"] - before["recognised"])
        table.append(
            Figure(
                "recognised",
                "pictures in which a separate classifier sees the animal of the prompt",
                f"{before['recognised']:.1%}",
                f"{after['recognised']:.1%}",
                f"{points:+.1f} points",
            )
        )
    for name, value in after.get("others", {}).items():
        old = before["others"][name]
        meaning = "distance to the target, or its sampling floor (docs/worlds.md)"
        table.append(Figure(name, meaning, f"{old:.4f}", f"{value:.4f}", ""))
    return table
