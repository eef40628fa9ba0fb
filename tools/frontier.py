"""Every method beside the exact target on tiny-animals, at an equal time: docs/frontier.md.

    python tools/frontier.py --out runs/pictures        # two hours on two cores

A queue of runs of `nablagfn train`, most important first: the recipe of `make demo` by three seeds,
every method for the same minutes of one core, then longer runs with larger LoRAs. A run that ended
is kept, one that was cut off goes on where it stood, and what has not been run stays empty in the
page. OUT/target is the best there is, by `nablagfn target`; docs/frontier.md, its plots and
OUT/comparison.html are written from these files alone.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run per core; two threads each would crawl

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from proofs import carry_out_all
from proofs_run import RECORD, safe_name

from nablagfn.commands.target import TargetRequest, TargetResult, state_target
from nablagfn.evaluation.reached import Reached
from nablagfn.recipes.options import load_config
from nablagfn.report import compare, kl_frontier
from nablagfn.report.read import FigureRow
from nablagfn.runs.runfolder import RunFolder

matplotlib.use("agg")
from matplotlib import pyplot as plt

BETA = 6.0
BETAS = (0.5, 1.0, 2.0, 3.0, 4.0, BETA, 9.0)  # of the frontier
MINUTES = 8.0  # of one core, for each method
SEEDS = (0, 1, 2)
SHARES = (0.25, 0.5)  # of the target's gain, whose times are told
SHOWN = "background: yellow"  # what the target changes most

ON_POLICY: dict[str, object] = {  # the settings of `demo`, with the reward and the β of `warmth`
    "experiment.reward_fn": "warmth",
    "model.reward_scale": BETA,
    "training.num_epochs": 10_000,  # the minutes end it
    "logging.eval_freq": 5,
}
WHOLE = {"experiment.method": "nabla-db-lambda", "model.reward_adaptive_mode": "none"}
RIVALS: dict[str, dict[str, object]] = {
    "residual ∇-DB (paper)": {},
    "no_flow (paper)": {"model.no_flow": True},
    "∇-DB(λ)": {**WHOLE, "method.window": 5, "method.return_lambda": 0.9},
    "Adjoint Matching": {"experiment.method": "adjoint-matching"},
    "terminal gradient": {"experiment.method": "terminal-gradient"},
    "DAG-DB": {"experiment.method": "dag-db"},
    "DDPO": {"experiment.method": "ddpo"},
    "ReFL": {"experiment.method": "refl"},
    "DRaFT-4": {"experiment.method": "draft-k", "method.draft_steps": 4},
    "DRaFT-LV": {"experiment.method": "draft-lv"},
    "AlignProp": {"experiment.method": "alignprop"},
}
PROBED: dict[str, object] = {"logging.eval_freq": 20}
LINEAR, CARRIED, NOISE = "∇-DB on a pool, linear fit", "∇-DB on a pool", "reward-weighted"
POOLED: dict[str, dict[str, object]] = {  # the settings of `warmth`
    LINEAR: {**PROBED, "training.num_epochs": 200, "pool.size": 540, "pool.images_per_prompt": 12},
    CARRIED: {**PROBED, "training.num_epochs": 120, "pool.gradient": "carried"},
    NOISE: {
        **PROBED,
        "experiment.method": "reward-weighted",
        "training.num_epochs": 120,
        "pool.gradient": "carried",
        "pool.looks": 6,
    },
}
LONG: dict[str, object] = {
    **PROBED,
    "pool.size": 1800,
    "pool.images_per_prompt": 40,
    "training.num_epochs": 300,
}
LARGER: dict[str, dict[str, object]] = {
    "rank 8, attention": {},
    "rank 16, all layers": {"model.lora_rank": 16, "model.lora_targets": "all"},
    "rank 64, all layers": {"model.lora_rank": 64, "model.lora_targets": "all"},
}
FIRST = ("residual ∇-DB (paper)", LINEAR, "Adjoint Matching", "∇-DB(λ)", "terminal gradient")


@dataclass(frozen=True)
class Run:
    """One training of the queue. minutes: after which it ends; 0: its epochs end it."""

    table: str
    label: str
    recipe: str
    options: tuple[tuple[str, object], ...] = ()
    seed: int = 0
    minutes: float = 0.0

    @property
    def experiment(self) -> str:
        return safe_name(self.table, self.label)

    def folder(self, out: Path) -> RunFolder:
        return RunFolder(out / f"warmth_{self.experiment}_seed{self.seed}")

    def done(self, out: Path) -> bool:
        record = self.folder(out).read_json(RECORD)
        return record is not None and not record["diverged"] and self.measured(out) is not None

    def measured(self, out: Path) -> dict[str, Any] | None:
        """evaluation.json, once the finetuned model is in it."""
        found: dict[str, Any] = self.folder(out).read_json("evaluation.json") or {}
        return found if "after" in found else None

    def arguments(self, out: Path) -> list[str]:
        options = {
            "logging.sample_freq": 0,
            "logging.num_samples": 48,
            "logging.tensorboard": False,
            "evaluation.num_prompts": 45,
            "evaluation.images_per_prompt": 8,
            **dict(self.options),
            "training.max_minutes": self.minutes,
            "saving.output_dir": out,
        }
        settings = (f"--config.{key}={value}" for key, value in options.items())
        name = f"--exp_name={self.experiment}"
        return ["train", f"--config={self.recipe}", f"--seed={self.seed}", name, *settings]


def queue() -> list[Run]:
    """All runs, most important first."""
    demo = [Run("demo", "make demo", "warmth", seed=seed) for seed in SEEDS]
    methods = [
        *(method(label, "demo", {**ON_POLICY, **own}) for label, own in RIVALS.items()),
        *(method(label, "warmth", own) for label, own in POOLED.items()),
    ]
    early = [run for label in FIRST for run in methods if run.label == label]
    late = [run for run in methods if run.label not in FIRST]
    longer = [
        Run("long", label, "warmth", tuple({**LONG, **own}.items()))
        for label, own in LARGER.items()
    ]
    return [*demo, *early, *late, *longer]


def method(label: str, recipe: str, options: Mapping[str, object]) -> Run:
    return Run("method", label, recipe, tuple(options.items()), minutes=MINUTES)


@dataclass(frozen=True)
class Outcome:
    """What a run reached. times: seconds of training until each of SHARES of the target's gain, by
    its probes; None where it did not get there. curve: (seconds, gain, path KL) of its probes."""

    run: Run
    reward: float
    path_kl: float
    diversity: float
    recognised: float
    beside: Reached
    minutes: float
    updates: int
    times: tuple[float | None, ...]
    curve: tuple[tuple[float, float, float], ...]


def outcome(run: Run, out: Path) -> Outcome:
    measured = run.measured(out)
    assert measured is not None
    before, after = measured["before"], measured["after"]
    beside = Reached.read(measured["against_target"])
    rows = run.folder(out).metrics()
    curve = [
        (row["seconds"], row["probe_gain"], row["probe_path_kl"])
        for row in rows
        if "probe_gain" in row
    ]
    assert beside.target_reward is not None
    wanted = beside.target_reward - before["reward_mean"]
    return Outcome(
        run,
        after["reward_mean"],
        after["path_kl"],
        after["diversity"],
        after["recognised"],
        beside,
        rows[-1]["seconds"] / 60,
        rows[-1]["update"],
        tuple(reached_at(curve, share * wanted) for share in SHARES),
        tuple(curve),
    )


def reached_at(curve: Sequence[tuple[float, float, float]], gain: float) -> float | None:
    """Seconds until the gain, on straight lines from one probe to the next; None where no probe
    has it."""
    before = (0.0, 0.0)
    for seconds, found, _ in curve:
        if found >= gain:
            share = (gain - before[1]) / (found - before[1])
            return before[0] + share * (seconds - before[0])
        before = (seconds, found)
    return None


# ------------------------------------------------------------------------------------ the plots


def blank() -> Axes:
    """The panel of a new figure."""
    return plt.subplots(figsize=(8, 4.8), layout="constrained")[1]


def finish(panel: Axes, about: str, path: Path) -> None:
    """Title and legend; the figure's file."""
    panel.set_title(about, fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.savefig(path, dpi=120)
    plt.close()


def draw(found: Sequence[Outcome], path: Path) -> None:
    """Share of the target's gain to the right, diversity upwards; the target is at 100 %."""
    panel = blank()
    for i, o in enumerate(found):
        color = plt.get_cmap("tab20")(i % 20)
        x, y = 100 * (o.beside.gain_reached or 0.0), o.diversity
        panel.scatter(x, y, s=45, color=color, label=o.run.label)
    at = found[0].beside.target_diversity
    panel.scatter(100, at, s=130, marker="*", color="black", label="target")
    panel.axvline(0, color="0.8", lw=0.8, zorder=0)
    panel.set_xlabel("gain of reward, % of the target's")
    panel.set_ylabel("diversity within prompts")
    finish(panel, f"tiny-animals, {MINUTES:g} minutes of one core each", path)


def draw_under_the_best(found: Sequence[Outcome], target: TargetResult, path: Path) -> None:
    """Reward against the KL that was spent, under the best reward there is for it."""
    spent = [
        kl_frontier.Spent(FigureRow(value=o.path_kl), FigureRow(value=o.reward), "", o.run.label)
        for o in found
    ]
    panel = blank()
    kl_frontier.draw(panel, target.frontier, spent)
    panel.set_xlabel(kl_frontier.X_LABEL)
    finish(panel, f"tiny-animals, {MINUTES:g} minutes of one core each", path)


# ------------------------------------------------------------------------------------- the page

PAGE = """# Every method beside the exact target on tiny-animals

Written by `make proofs-pictures` (tools/frontier.py) from {done} of {wanted} runs; a cell with "–"
was not run, or not reached. Reward: `warmth`, the mean of red minus blue. β = {beta:g}, at which
the target has {kl:.2f} nats. All figures are of 45 prompts × 8 pictures, before and after on the
same seeds, raw (no resampling); what the target would be is told by the same pictures of the
pretrained model. Efficiency: the least KL that buys the reward which was reached, over the KL that
was spent.

## `make demo`, three seeds

| seed | minutes | reward | target | gain reached | path KL | of the target | efficiency | yellow backgrounds | target | diversity | target | recognised | target |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
{demo}

## Every method, {minutes:g} minutes of one core each

Seed 0. The methods that learn from their own paths have the settings of the recipe `demo` (16
trajectories an epoch, learning rate 1e-3, rank 8, the LoRA at all steps), those with a pool the
settings of `warmth`. ReFL, DRaFT, AlignProp and DDPO have no prior, and so no target that they
would aim at: minutes are all that stops them. Minutes are those of training, the drawing of a pool
included, measuring not; two runs shared two cores.

![reward against KL, under the best there is](images/frontier_kl.png)

![gain against diversity](images/frontier.png)

| method | updates | gain reached | path KL | least | efficiency | diversity | recognised | minutes to 25 % | to 50 % |
|---|---|---|---|---|---|---|---|---|---|
{methods}

The target has a diversity of {diversity:.3f} and is recognised in {recognised:.1%}; the pretrained
model {base}. {ratio}

## Longer, with larger LoRAs

The recipe of `warmth` with 1,800 paths and 300 updates of 64 transitions: what is left to gain by
time, and by capacity.

| LoRA | minutes | gain reached | path KL | efficiency | cosine of the last 20 updates |
|---|---|---|---|---|---|
{long}

Gain (in % of the target's) and path KL by minutes, on 48 samples of fixed seeds:

{curves}
"""


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def minutes_or_dash(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds / 60:.1f}"


def demo_row(run: Run, o: Outcome | None) -> str:
    if o is None:
        return f"| {run.seed} |" + " – |" * 13
    b, shown = o.beside, o.beside.shares[SHOWN]
    return (
        f"| {run.seed} | {o.minutes:.1f} | {o.reward:.3f} | {b.target_reward:.3f} "
        f"| {percent(b.gain_reached)} | {o.path_kl:.2f} | {b.target_kl:.2f} "
        f"| {percent(b.efficiency)} | {shown.before:.0%} → {shown.after:.0%} "
        f"| {percent(shown.target)} | {o.diversity:.3f} | {b.target_diversity:.3f} "
        f"| {o.recognised:.1%} | {b.target_recognised:.1%} |"
    )


def method_row(run: Run, o: Outcome | None) -> str:
    if o is None:
        return f"| {run.label} |" + " – |" * 9
    b = o.beside
    least = "–" if b.least_kl is None else f"{b.least_kl:.3f}"
    quarter, half = (minutes_or_dash(seconds) for seconds in o.times)
    return (
        f"| {run.label} | {o.updates} | {percent(b.gain_reached)} | {o.path_kl:.2f} | {least} "
        f"| {'–' if b.efficiency is None else f'{b.efficiency:.1%}'} | {o.diversity:.3f} "
        f"| {o.recognised:.1%} | {quarter} | {half} |"
    )


def long_row(run: Run, o: Outcome | None, out: Path) -> str:
    if o is None:
        return f"| {run.label} |" + " – |" * 5
    cosine = np.mean([row["cosine"] for row in run.folder(out).metrics()[-20:]])
    b = o.beside
    return (
        f"| {run.label} | {o.minutes:.1f} | {percent(b.gain_reached)} | {o.path_kl:.2f} "
        f"| {percent(b.efficiency)} | {cosine:.2f} |"
    )


def curve_of(o: Outcome, start: float) -> str:
    """One line: what each probe found."""
    assert o.beside.target_reward is not None
    wanted = o.beside.target_reward - start
    points = (f"{s / 60:.1f}: {gain / wanted:.0%} at {kl:.2f}" for s, gain, kl in o.curve)
    return f"* {o.run.label}: {'; '.join(points)}"


def ratio(found: Mapping[str, Outcome]) -> str:
    """How long the published method takes for what ours has reached."""
    published, ours = found.get(FIRST[0]), found.get(LINEAR)
    if published is None or ours is None:
        return ""
    told = []
    for share, theirs, own in zip(SHARES, published.times, ours.times, strict=True):
        if own is None:
            told.append(f"{share:.0%} of the gain: not reached by {LINEAR}")
        elif theirs is None:
            told.append(f"{share:.0%}: the published method did not get there in {MINUTES:g} min")
        else:
            told.append(f"{share:.0%}: {theirs / own:.2g} times as long as {LINEAR}")
    return f"Time of the published method: {'; '.join(told)}."


def best(out: Path) -> TargetResult:
    """The target of all runs, drawn as far as it is not there."""
    return state_target(load_config("warmth"), TargetRequest(betas=BETAS, out=out / "target"))


def write(out: Path, docs: Path, target: TargetResult) -> Path:
    """docs/frontier.md and its plots."""
    wanted = queue()
    found = {run: outcome(run, out) for run in wanted if run.done(out)}
    table = {
        name: [run for run in wanted if run.table == name] for name in ("demo", "method", "long")
    }
    compared = [found[run] for run in table["method"] if run in found]
    (docs / "images").mkdir(parents=True, exist_ok=True)
    if compared:
        draw(compared, docs / "images" / "frontier.png")
        draw_under_the_best(compared, target, docs / "images" / "frontier_kl.png")
    at = next(row for row in target.rows if row.beta == BETA)
    start = target.base.reward.value
    page = docs / "frontier.md"
    text = PAGE.format(
        done=len(found),
        wanted=len(wanted),
        beta=BETA,
        minutes=MINUTES,
        kl=at.kl.value,
        demo="\n".join(demo_row(run, found.get(run)) for run in table["demo"]),
        methods="\n".join(method_row(run, found.get(run)) for run in table["method"]),
        diversity=at.diversity.value,
        recognised=at.recognised.value if at.recognised else float("nan"),
        base=f"{target.base.diversity.value:.3f}",
        ratio=ratio({o.run.label: o for o in compared}),
        long="\n".join(long_row(run, found.get(run), out) for run in table["long"]),
        curves="\n".join(curve_of(o, start) for o in found.values() if o.run.table != "demo"),
    )
    page.write_text(text, encoding="utf-8")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only-write", action="store_true", help="from the runs that are there")
    arguments = parser.parse_args()
    failures = []
    if not arguments.only_write:
        failures = carry_out_all(queue(), arguments.out, arguments.processes)
    target = best(arguments.out)
    print(f"wrote {write(arguments.out, arguments.docs, target)}")
    done = [run.folder(arguments.out) for run in queue() if run.done(arguments.out)]
    if done:  # the same as `nablagfn report RUN… --out …`
        page = compare(done, arguments.out / "comparison.html", target.folder)
        print(f"wrote {page}")
    if failures:
        raise SystemExit(f"{len(failures)} runs ended early")


if __name__ == "__main__":
    main()
