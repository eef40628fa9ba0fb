"""Reward against diversity and KL on tiny-animals: every method, three reward scales, one table.

    python tools/frontier.py --out runs/frontier        # an hour on two cores

Each run is `nablagfn train --config=demo` with a method and a reward scale: the same number of
updates, trajectories and seed for all, measured on the same prompts and seeds. Methods without a
prior term have no use for a scale (AdamW and the advantage's normalisation take it out), so they
run once. OUT/target is the best that there is, by `nablagfn target`. Finished runs and draws are
kept; docs/frontier.md and OUT/comparison.html are written from their files.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run per core; two threads each would crawl

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from proofs import carry_out_all
from proofs_run import safe_name

from nablagfn.commands.target import TargetRequest, TargetResult, state_target
from nablagfn.config import Config
from nablagfn.methods.registry import find_method
from nablagfn.recipes.options import load_config
from nablagfn.report import compare, kl_frontier
from nablagfn.report.read import FigureRow
from nablagfn.runs.runfolder import RunFolder

matplotlib.use("agg")
from matplotlib import pyplot as plt

UPDATES = 6
BETAS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the target
SCALES = (100.0, 1_000.0, 10_000.0)
COMPARED: dict[str, dict[str, object]] = {
    "residual ∇-DB (paper)": {},
    "no_flow (paper)": {"model.no_flow": True},
    "∇-DB(λ)": {
        "experiment.method": "nabla-db-lambda",
        "method.window": 5,  # as many transitions as the other methods have
        "method.return_lambda": 0.9,
        "model.reward_adaptive_mode": "none",
    },
    "Adjoint Matching": {"experiment.method": "adjoint-matching"},
    "terminal gradient": {"experiment.method": "terminal-gradient"},
    "DAG-DB": {"experiment.method": "dag-db"},
    "DDPO": {"experiment.method": "ddpo"},
    "ReFL": {"experiment.method": "refl"},
    "DRaFT-4": {"experiment.method": "draft-k", "method.draft_steps": 4},
    "DRaFT-LV": {"experiment.method": "draft-lv"},
    "AlignProp": {"experiment.method": "alignprop"},
}
MARKERS = dict(zip(SCALES, "os^", strict=True))


@dataclass(frozen=True)
class Run:
    """One training of the frontier; scale: β, or None for a method without one."""

    label: str
    scale: float | None
    options: tuple[tuple[str, object], ...]

    @property
    def name(self) -> str:
        return safe_name(self.label, "" if self.scale is None else f"{self.scale:g}")

    def folder(self, out: Path) -> RunFolder:
        return RunFolder(out / f"tiny-aesthetic_{self.name}_seed0")

    def done(self, out: Path) -> bool:
        evaluation = self.folder(out).read_json("evaluation.json") or {}
        return evaluation.get("updates") == UPDATES

    def arguments(self, out: Path) -> list[str]:
        options = {
            **dict(self.options),
            "model.reward_scale": self.scale or SCALES[1],
            "training.num_epochs": UPDATES,
            "evaluation.num_prompts": 45,
            "evaluation.images_per_prompt": 2,
            "logging.sample_freq": 0,
            "logging.save_freq": UPDATES,
            "logging.tensorboard": False,
            "saving.output_dir": out,
        }
        settings = (f"--config.{key}={value}" for key, value in options.items())
        return ["train", "--config=demo", "--seed=0", f"--exp_name={self.name}", *settings]


def runs() -> list[Run]:
    """Each method at each scale, or once where it has no prior."""
    return [
        Run(label, scale, tuple(options.items()))
        for label, options in COMPARED.items()
        for scale in (SCALES if has_prior(options) else (None,))
    ]


def has_prior(options: Mapping[str, object]) -> bool:
    return find_method(str(options.get("experiment.method", Config().experiment.method))).has_prior


@dataclass(frozen=True)
class Outcome:
    """What a run gained (in standard deviations of the base model's rewards), spent and kept.

    gained: the same gain in reward. path_kl: KL(p_θ‖p_#) of the paths, in nats.
    """

    run: Run
    gain: float
    gained: float
    path_kl: float
    diversity: float
    recognised: float
    evals: float


def outcome(run: Run, out: Path) -> Outcome:
    measured = run.folder(out).read_json("evaluation.json")
    before, after = measured["before"], measured["after"]
    gained = after["reward_mean"] - before["reward_mean"]
    return Outcome(
        run,
        gained / before["reward_std"],
        gained,
        after["path_kl"],
        after["diversity"] / before["diversity"],
        after["recognised"] - before["recognised"],
        sum(row["model_evals"] for row in run.folder(out).metrics()),
    )


def blank() -> Axes:
    """The panel of a new figure."""
    return plt.subplots(figsize=(8, 4.8), layout="constrained")[1]


def finish(panel: Axes, about: str, path: Path) -> None:
    """Title and legend; the figure's file."""
    title = f"tiny-animals, {UPDATES} updates of 16 trajectories\n{about}"
    panel.set_title(title, fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.savefig(path, dpi=120)
    plt.close()


def draw(found: list[Outcome], path: Path) -> None:
    """Reward gained to the right, diversity kept upwards; one colour per method."""
    panel = blank()
    labels = list(dict.fromkeys(o.run.label for o in found))
    for i, label in enumerate(labels):
        own = [o for o in found if o.run.label == label]
        color = plt.get_cmap("tab20")(i)
        panel.plot([o.gain for o in own], [100 * o.diversity for o in own], "-", color=color, lw=1)
        for j, o in enumerate(own):
            marker = "*" if o.run.scale is None else MARKERS[o.run.scale]
            size = 130 if marker == "*" else 45
            name = label if j == 0 else None
            panel.scatter(o.gain, 100 * o.diversity, s=size, marker=marker, color=color, label=name)
    panel.axhline(100, color="0.8", lw=0.8, zorder=0)
    panel.axvline(0, color="0.8", lw=0.8, zorder=0)
    panel.set_xlabel("reward gained (standard deviations of the base model's rewards)")
    panel.set_ylabel("diversity kept (%)")
    scales = ", ".join(f"{name} β = {s:g}" for s, name in zip(SCALES, ("●", "■", "▲"), strict=True))
    finish(panel, f"{scales}, ★ no β", path)


def draw_under_the_best(found: list[Outcome], target: TargetResult, path: Path) -> None:
    """Reward against the KL that was spent, under the best reward there is for it."""
    start = target.base.reward.value
    spent = [
        kl_frontier.Spent(
            FigureRow(value=o.path_kl),
            FigureRow(value=start + o.gained),
            "",
            o.run.label,
        )
        for o in found
    ]
    panel = blank()
    kl_frontier.draw(panel, target.frontier, spent)
    panel.set_xlabel(kl_frontier.X_LABEL)
    scales = ", ".join(f"{scale:g}" for scale in SCALES)
    finish(panel, f"lines: β = {scales}", path)


def least_kl(target: TargetResult, gained: float) -> float | None:
    """The KL that the best sampler needs for the same gain; None without a gain, or beyond what the
    samples show."""
    rewards = [point.reward.value - target.base.reward.value for point in target.frontier]
    if not 0 < gained <= rewards[-1]:
        return None
    root = [max(point.kl.value, 0) ** 0.5 for point in target.frontier]  # a line near no gain
    return float(np.interp(gained, rewards, root)) ** 2


HEAD = """# Reward against diversity and KL on tiny-animals

Written by `make frontier` (tools/frontier.py) from {done} of {wanted} runs: {updates} updates of
16 trajectories, one seed, learning rate 1e-3, 45 prompts × 2 pictures measured before and after on
the same seeds. Gain: in standard deviations of the base model's rewards. Kept: mean pairwise
feature distance within prompts against the base model's. Recognised: change of the share in which
a separate classifier sees the prompt's animal, in points (90 pictures: one is 1.1 points). ReFL,
DRaFT, AlignProp and DDPO have no prior term, so β would not change them; they run once. All
methods are far from convergence: this shows the direction in which each starts, not where it ends.
KL: nats spent, by the paths. Least: nats that the best sampler needs for the same gain, by
`nablagfn target` from 45 × {images} pictures of the pretrained model ([target.md](target.md)).

![reward against diversity](images/frontier.png)

![reward against KL](images/frontier_kl.png)

| method | β | gain (σ) | KL | least | diversity kept | recognised | model evaluations (thousands) |
|---|---|---|---|---|---|---|---|
"""


def row_of(o: Outcome, target: TargetResult) -> str:
    """A line of the table."""
    least = least_kl(target, o.gained)
    return (
        f"| {o.run.label} | {'–' if o.run.scale is None else f'{o.run.scale:g}'} | {o.gain:+.2f} "
        f"| {o.path_kl:.1f} | {'–' if least is None else f'{least:.3f}'} "
        f"| {o.diversity:.1%} | {100 * o.recognised:+.1f} | {o.evals / 1e3:.1f} |"
    )


def best(out: Path) -> TargetResult:
    """The target of all runs, drawn as far as it is not there."""
    return state_target(load_config("demo"), TargetRequest(betas=BETAS, out=out / "target"))


def write(out: Path, docs: Path, target: TargetResult) -> Path:
    """docs/frontier.md and its plots."""
    wanted = runs()
    found = [outcome(run, out) for run in wanted if run.done(out)]
    (docs / "images").mkdir(parents=True, exist_ok=True)
    draw(found, docs / "images" / "frontier.png")
    draw_under_the_best(found, target, docs / "images" / "frontier_kl.png")
    rows = [row_of(o, target) for o in found]
    head = HEAD.format(
        done=len(found), wanted=len(wanted), updates=UPDATES, images=target.images_per_prompt
    )
    page = docs / "frontier.md"
    page.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only-write", action="store_true", help="from the runs that are there")
    arguments = parser.parse_args()
    failures = []
    if not arguments.only_write:
        failures = carry_out_all(runs(), arguments.out, arguments.processes)
    target = best(arguments.out)
    print(f"wrote {write(arguments.out, arguments.docs, target)}")
    done = [run.folder(arguments.out) for run in runs() if run.done(arguments.out)]
    if done:  # the same as `nablagfn report RUN… --out …`
        page = compare(done, arguments.out / "comparison.html", target.folder)
        print(f"wrote {page}")
    if failures:
        raise SystemExit(f"{len(failures)} runs ended early")


if __name__ == "__main__":
    main()
