"""docs/proofs.md and its figures from the runs of tools/proofs.py; nothing is written by hand."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader
from proofs_run import Run

matplotlib.use("agg")
from matplotlib import pyplot as plt

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t, two-sided 95 %, by number of seeds


@dataclass(frozen=True)
class Point:
    """Figures of one run after `updates`, at a cost of `evals` model evaluations."""

    updates: int
    evals: float
    figures: dict[str, float]

    @property
    def ratio(self) -> float:
        """MMD² over its sampling floor, the worst prompt's."""
        return self.figures["mmd2_ratio"]

    @property
    def kl(self) -> float:
        """Mode-mass KL, or the exact KL of a Gaussian world, in nats."""
        name = "mode_kl" if "mode_kl" in self.figures else "gaussian_kl"
        return self.figures[name]

    @property
    def reward(self) -> float:
        return self.figures["reward"]


Curves = dict[tuple[str, str], list[list[Point]]]  # (world, label) -> one curve per seed


def curve(run: Run, out: Path) -> list[Point]:
    """The probes of one run, in order."""
    points, evals = [], 0.0
    for row in run.folder(out).metrics():
        evals += row["model_evals"]
        figures = {k.removeprefix("probe_"): v for k, v in row.items() if k.startswith("probe_")}
        if "mmd2_ratio" in figures:
            points.append(Point(row["update"], evals, figures))
    return points


def curves(runs: Sequence[Run], out: Path, table: str) -> Curves:
    """All finished runs of one table."""
    found: Curves = {}
    for run in runs:
        if run.table == table and run.done(out):
            found.setdefault((run.world, run.label), []).append(curve(run, out))
    return found


def interval(values: Sequence[float], digits: str = ".2f") -> str:
    """Mean ± half of the 95 % t-interval over seeds."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:{digits}}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = T95.get(len(values), 2.0) * spread / math.sqrt(len(values))
    return f"{mean:{digits}} ± {half:{digits}}"


def at_cost(points: Sequence[Point], budget: float) -> Point | None:
    """The last probe within the budget of model evaluations."""
    within = [p for p in points if p.evals <= budget]
    return within[-1] if within else None


def cell(points: Sequence[Point | None], otherwise: str) -> str:
    """MMD² over floor and KL of several seeds in one table cell."""
    known = [p for p in points if p is not None]
    if not known:
        return otherwise
    ratio, kl = [p.ratio for p in known], [p.kl for p in known]
    return f"{interval(ratio, '.1f')} / {interval(kl, '.3f')}"


def table(
    found: Curves,
    pick: Callable[[list[Point]], Point | None],
    endless: Collection[tuple[str, str]] = (),
) -> list[dict[str, Any]]:
    """One row per method: a cell for each world. endless: (world, label) that diverged."""
    worlds = list(dict.fromkeys(world for world, _ in found))
    labels = list(dict.fromkeys(label for _, label in found))
    rows = []
    for label in labels:
        cells = [
            cell(
                [pick(curve) for curve in found.get((world, label), [])],
                "no end" if (world, label) in endless else "–",
            )
            for world in worlds
        ]
        rows.append({"label": label, "cells": cells})
    return rows


def claim_rows(found: Curves, label: str) -> list[dict[str, Any]]:
    """One row per world of the headline claim; `holds` counts seeds within both bounds."""
    rows = []
    for (world, method), seeds in found.items():
        if method != label:
            continue
        last = [points[-1] for points in seeds]
        rows.append(
            {
                "world": world,
                "reward": interval([p.reward for p in last], ".3f"),
                "target": f"{last[0].figures['reward_target']:.3f}",
                "ratios": ", ".join(f"{p.ratio:.2f}" for p in last),
                "kls": ", ".join(f"{p.kl:.4f}" for p in last),
                "swd": interval([p.figures["swd"] / p.figures["swd_floor"] for p in last], ".2f"),
                "holds": sum(p.ratio <= 3 and p.kl <= 0.01 for p in last),
                "seeds": len(last),
                "evals": f"{sum(p.evals for p in last) / len(last) / 1e6:.2f}",
            }
        )
    return rows


def draw_costs(found: Curves, path: Path) -> None:
    """MMD² over floor against model evaluations, a panel per world, a line per method."""
    worlds = list(dict.fromkeys(world for world, _ in found))
    labels = list(dict.fromkeys(label for _, label in found))
    colors = plt.get_cmap("tab20" if len(labels) > 10 else "tab10")
    figure, panels = plt.subplots(
        1, len(worlds), figsize=(3.6 * len(worlds), 3.4), sharey=True, layout="constrained"
    )
    for panel, world in zip(panels if len(worlds) > 1 else [panels], worlds, strict=True):
        for (name, label), seeds in found.items():
            if name != world:
                continue
            length = min(map(len, seeds))
            mean = [sum(s[j].ratio for s in seeds) / len(seeds) for j in range(length)]
            cost = [seeds[0][j].evals / 1e6 for j in range(length)]
            style = "-" if label.startswith(("∇", "Adjoint")) else "--"
            panel.plot(cost, mean, style, label=label, color=colors(labels.index(label)), lw=1.6)
        panel.axhline(3, color="0.6", lw=0.8)
        panel.set(title=f"worlds/{world}", yscale="log", xlabel="model evaluations (millions)")
        panel.spines[["top", "right"]].set_visible(False)
    shown = list(panels) if len(worlds) > 1 else [panels]
    shown[0].set_ylabel("MMD² / sampling floor")
    pairs = [panel.get_legend_handles_labels() for panel in shown]
    known = {
        name: handle
        for handles, names in pairs
        for handle, name in zip(handles, names, strict=True)
    }
    figure.legend(
        known.values(), known.keys(), loc="outside lower center", ncols=6, fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_samples(runs: Sequence[Run], out: Path, world: str, path: Path) -> None:
    """Target and every method's samples in one world, seed 0, same noise."""
    import torch

    from nablagfn.commands.assemble import build_policy, build_view
    from nablagfn.evaluation import draw
    from nablagfn.methods.build import build_kernel
    from nablagfn.runs.runfolder import complete_checkpoints
    from nablagfn.training.checkpoint import load_policy

    chosen = [r for r in runs if r.table == "compared" and r.world == world and r.seed == 0]
    clouds: list[tuple[str, torch.Tensor]] = []
    for run in (r for r in chosen if r.done(out)):
        config = run.folder(out).config()
        policy = build_policy(config, torch.device("cpu"))
        load_policy(policy, complete_checkpoints(run.folder(out).checkpoints)[-1])
        view: Any = build_view(config)
        prompt = view.world.prompts[0]
        if not clouds:
            clouds.append(("target", view.target(prompt).resample(2000, torch.Generator())))
        table = build_kernel(config, policy)
        clouds.append((run.label, draw(policy, table, [prompt] * 2000, range(2000), seed=7)))
    columns = 4
    rows = -(-len(clouds) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(2.6 * columns, 2.7 * rows), layout="constrained", squeeze=False
    )
    for panel in panels.flat:
        panel.axis("off")
    for panel, (label, x) in zip(panels.flat, clouds, strict=False):
        color = "#2456a6" if label == "target" else "#d1622b"
        panel.scatter(x[:, 0], x[:, 1], s=2, alpha=0.35, color=color, lw=0)
        panel.set(xlim=(-3.3, 3.3), ylim=(-3.3, 3.3), aspect="equal")
        panel.set_title(label, fontsize=10)
        if float((x.abs().amax(1) > 3.3).float().mean()) > 0.3:
            where = f"outside: mean x₁ {float(x[:, 0].mean()):.3g}"
            panel.text(0, 0, where, ha="center", va="center", fontsize=9, color="0.4")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def records(runs: Sequence[Run], out: Path) -> list[tuple[Run, dict[str, Any]]]:
    """The runs that ended, and what is recorded of each."""
    found = [(run, run.folder(out).read_json("proof.json")) for run in runs]
    return [(run, record) for run, record in found if record is not None]


def write(runs: Sequence[Run], out: Path, docs: Path) -> Path:
    """docs/proofs.md and docs/images/; what has not been run is left out and said so."""
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    claim, compared, study = (curves(runs, out, t) for t in ("claim", "compared", "study"))
    if compared:
        draw_costs(compared, images / "proofs_costs.png")
        draw_samples(runs, out, "ring", images / "proofs_ring.png")
    if claim:
        draw_costs(claim, images / "proofs_claim.png")
    worlds = list(dict.fromkeys(world for world, _ in claim))
    for world in worlds:
        run = next(r for r in runs if r.table == "claim" and r.world == world and r.seed == 0)
        shutil.copy(run.folder(out).grids / "after.png", images / f"world_{world}.png")
    known = records(runs, out)
    diverged = [run for run, record in known if record["diverged"]]
    endless = {(run.world, run.label) for run in diverged}
    budget = min((seeds[0][-1].evals for seeds in compared.values()), default=0.0)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("proofs.md.j2").render(
        worlds=worlds,
        compared_worlds=list(dict.fromkeys(world for world, _ in compared)),
        ours=claim_rows(claim, "∇-DB(λ)"),
        updates=max((seeds[0][-1].updates for seeds in compared.values()), default=0),
        same_cost=max(
            (s[0][-1].updates for (_, label), s in claim.items() if label.startswith("Adj")),
            default=0,
        ),
        adjoint=claim_rows(claim, "Adjoint Matching"),
        equal_updates=table(compared, lambda points: points[-1], endless),
        equal_evals=table(compared, lambda points: at_cost(points, budget), endless),
        budget=f"{budget / 1e6:.2f}",
        study=table(study, lambda points: points[-1]),
        ended=len(known),
        diverged=len(diverged),
        wanted=len(runs),
        core_minutes=round(sum(record["cpu_seconds"] for _, record in known) / 60),
    )
    target = docs / "proofs.md"
    target.write_text(text, encoding="utf-8")
    return target
