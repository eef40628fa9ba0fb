"""Which sampler hits the target on flow models: trainings in worlds/ring-flow with two samplers.

    python tools/flow_samplers.py --out runs/flow-samplers     # a quarter of an hour on one core

The same methods on the same budget, once with the memoryless posterior and once with Flow-SDE, and
beside them what perfect training of each sampler would draw: paths of the pretrained sampler, one
of many from the same first noise chosen by exp(βr). Writes docs/flow_samplers.json, the table in
docs/models.md and docs/images/flow_samplers.png. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run per core

import torch
from flow_samplers_picture import Panel, draw_panels
from pages import insert_between
from proofs import carry_out_all
from proofs_run import folder_of, reached, safe_name, train_arguments
from torch import Tensor

from nablagfn.commands.assemble import build_policy
from nablagfn.config import Config, set_option
from nablagfn.core import rng
from nablagfn.core.kernels import KernelTable
from nablagfn.core.rollout import rollout
from nablagfn.evaluation import draw_paths
from nablagfn.methods.build import build_kernel
from nablagfn.recipes.options import load_config
from nablagfn.runs.runfolder import RunFolder, checkpoint_name
from nablagfn.training.checkpoint import load_policy
from nablagfn.worlds import load
from nablagfn.worlds.measure import distances, floors
from nablagfn.worlds.measures import mode_mass_kl, mode_masses
from nablagfn.worlds.policy import WorldPolicy
from nablagfn.worlds.target import Target

WORLD, STEPS, UPDATES, SEEDS = "ring-flow", 20, 400, (0, 1, 2)
ROWS, SEED = 4_000, 55_000  # of the draws that are judged
PICTURED = 40_000
CHUNK = 8_192  # paths drawn at a time
BASE = 200_000  # exact draws of the density, weighted to the target
STARTS, BRANCHES = 256, 2_048  # first noises and paths from each, for perfect training
SHARED: dict[str, object] = {  # short paths, a high learning rate: as in tests/test_proofs.py
    "training.lr": 5e-3,
    "training.flow_lr": 5e-3,
    "model.timestep_fraction": 5 / STEPS,
    "sampling.num_steps": STEPS,
    "evaluation.num_prompts": 0,
    "logging.sample_freq": 0,
    "logging.save_freq": UPDATES,
    "training.num_epochs": UPDATES,
}
METHODS: dict[str, dict[str, object]] = {
    "nabla-db-lambda": {},
    "adjoint-matching": {"experiment.method": "adjoint-matching"},
    "nabla-db": {"experiment.method": "nabla-db"},
}
POSTERIOR, FLOW_SDE = "posterior (η = 1)", "Flow-SDE, a = 0.7"
MEMORYLESS = "Flow-SDE, a = √2"  # Euler's step of the memoryless process
SAMPLERS: dict[str, dict[str, object]] = {
    POSTERIOR: {},
    FLOW_SDE: {"sampling.scheduler": "flow-sde", "sampling.sde_noise": 0.7},
    MEMORYLESS: {"sampling.scheduler": "flow-sde", "sampling.sde_noise": 2**0.5},
}
LIMITS: dict[str, dict[str, object]] = {  # samplers whose perfect training is drawn
    **SAMPLERS,
    "CPS, a = 0.7": {"sampling.scheduler": "cps", "sampling.sde_noise": 0.7},
}
LIMIT_STEPS = (STEPS, 80)
START, END = "<!-- flow-samplers: written by tools/flow_samplers.py -->", "<!-- flow-samplers -->"


@dataclass(frozen=True)
class Run:
    """One training: `carry_out_all`'s job."""

    method: str
    sampler: str
    seed: int

    @property
    def name(self) -> str:
        return safe_name(self.method, self.sampler)

    def folder(self, out: Path) -> RunFolder:
        return folder_of(out, WORLD, self.name, self.seed)

    def done(self, out: Path) -> bool:
        return reached(self.folder(out), UPDATES)

    def arguments(self, out: Path) -> list[str]:
        options = {**SHARED, **METHODS[self.method], **SAMPLERS[self.sampler]}
        options["saving.output_dir"] = out
        return train_arguments(WORLD, self.name, self.seed, options)


@dataclass(frozen=True)
class Judged:
    """Samples against p·exp(βr): E[r], MMD² over its floor, KL of the mode masses in nats, and
    sliced Wasserstein distance over its floor."""

    reward: float
    mmd: float
    kl: float
    swd: float


@dataclass(frozen=True, eq=False)
class Limit:
    """x: [rows, d] draws of what perfect training of a sampler gives. reward: E[r], and masses of
    the modes [K], from all its paths."""

    x: Tensor
    reward: float
    masses: Tensor


def exact_target(config: Config, table: KernelTable, tilt: bool = True) -> Target:
    """p_N·exp(βr), p_N the density itself at the level where the sampler ends: the target of a
    sampler without an error of its own. tilt: False for p_N."""
    world = load(WORLD)
    assert world.closed_form is not None
    level = table.schedule
    alpha, sigma = float(level.alpha[-1]), float(level.sigma[-1])
    density = world.closed_form.mixture.noised(alpha, sigma)
    base = density.sample(BASE, rng.generator(0, "exact target"))
    rewards = world.reward(base.double(), torch.zeros(len(base), dtype=torch.long))
    strength = world.beta if tilt else 0.0
    return Target(world, world.prompts[0], base, (strength * rewards).softmax(0), rewards, None)


def judge(target: Target, x: Tensor) -> Judged:
    found, least = distances(target, x), floors(target, len(x))
    reward = target.world.reward(x.double(), torch.zeros(len(x), dtype=torch.long))
    return Judged(
        reward=float(reward.mean()),
        mmd=found["mmd2"] / least["mmd2"],
        kl=found["mode_kl"],
        swd=found["swd"] / least["swd"],
    )


def trained(run: Run, out: Path, rows: int) -> Tensor:
    """Draws of the last checkpoint, [rows, d]."""
    folder = run.folder(out)
    config = folder.config()
    policy = build_policy(config, torch.device("cpu"))
    load_policy(policy, folder.checkpoints / checkpoint_name(UPDATES))
    prompts = [load(WORLD).prompts[0]] * rows
    return draw_paths(policy, build_kernel(config, policy), prompts, range(rows), seed=SEED).clean


def settings_of(options: dict[str, object], steps: int) -> Config:
    config = load_config(f"worlds/{WORLD}")
    for key, value in {**options, "sampling.num_steps": steps}.items():
        set_option(config, key, value)
    return config


def first_noise() -> Tensor:
    """Evenly spread draws of N(0, 1), [STARTS, 2]."""
    even = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(STARTS, dtype=torch.float64)
    return torch.special.ndtri(even.clamp(1e-9, 1 - 1e-9)).float()


def untrained(config: Config, first: Tensor, branches: int) -> Tensor:
    """x_N of the pretrained sampler, [starts, branches, d], from each first noise [starts, d]."""
    policy = WorldPolicy(load(WORLD))
    table = build_kernel(config, policy)
    ends = []
    for i, block in enumerate(first.split(max(1, CHUNK // branches))):
        shape = (len(block), branches, table.num_steps, first.shape[1])
        generator = rng.generator(0, "branches", table.num_steps, i)
        later = torch.randn(shape, generator=generator)
        start = block[:, None, None].expand(-1, branches, 1, -1)
        noise = torch.cat([start, later], 2).flatten(0, 1)
        with policy.reference():
            where = policy.condition([policy.world.prompts[0]] * len(noise))
            clean = rollout(policy, table, noise, where).clean
        ends.append(clean.unflatten(0, (len(block), branches)))
    return torch.cat(ends)


def perfect(config: Config, rows: int = ROWS) -> Limit:
    """What perfect training draws: p_#(x_N|x_0)·exp(βr), normalised for each x_0 by itself.

    The optimal policy leaves x_0 where it is and tilts the rest of the path.
    """
    world = load(WORLD)
    ends = untrained(config, first_noise(), BRANCHES)
    prompt = torch.zeros(STARTS * BRANCHES, dtype=torch.long)
    reward = world.reward(ends.flatten(0, 1).double(), prompt).unflatten(0, (STARTS, BRANCHES))
    weights = (world.beta * reward).softmax(1)
    each = rows // STARTS + 1
    taken = torch.multinomial(weights, each, True, generator=rng.generator(0, "taken"))
    x = ends.gather(1, taken[..., None].expand(-1, -1, world.dim)).flatten(0, 1)
    order = torch.randperm(len(x), generator=rng.generator(0, "order"))[:rows]
    modes = world.mixture.mode_of(ends.flatten(0, 1).double())
    masses = mode_masses(modes, len(world.mixture), weights.flatten() / STARTS)
    return Limit(x[order], float((weights * reward).sum(1).mean()), masses)


def row_of(label: str, sampler: str, found: Sequence[Judged], **more: Any) -> dict[str, Any]:
    return {
        "label": label,
        "sampler": sampler,
        **more,
        **{key: [getattr(one, key) for one in found] for key in ("reward", "mmd", "kl", "swd")},
    }


def limits(out: Path) -> list[dict[str, Any]]:
    """Perfect training of each sampler at each number of steps, and the sampler untrained; what is
    known is kept in out/limits.json."""
    file = out / "limits.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rows = []
    for steps in LIMIT_STEPS:
        for sampler, options in LIMITS.items():
            key = f"{sampler}, {steps} steps, {STARTS} x {BRANCHES} paths"
            if key not in known:
                known[key] = {"sampler": sampler, "steps": steps, **limit_of(options, steps)}
                file.write_text(json.dumps(known, ensure_ascii=False), encoding="utf-8")
            rows.append(known[key])
    return rows


def limit_of(options: dict[str, object], steps: int) -> dict[str, float]:
    config = settings_of(options, steps)
    table = build_kernel(config, WorldPolicy(load(WORLD)))
    found, target = perfect(config), exact_target(config, table)
    judged = judge(target, found.x)
    first = torch.randn((ROWS, 2), generator=rng.generator(0, "others"))
    base = untrained(config, first, 1)[:, 0]
    return {
        "reward": found.reward,
        "target_reward": target.reward,
        "mmd": judged.mmd,
        "swd": judged.swd,
        "kl": float(mode_mass_kl(found.masses, target.masses)),
        "base_mmd": judge(exact_target(config, table, tilt=False), base).mmd,
        "kept": kept(table),
    }


def kept(table: KernelTable) -> float:
    """How much of the first noise is left: the correlation of x_0 and x_N for data N(0, 1), where
    x̂ = αx/(α² + σ²) and all is linear."""
    alpha, sigma = table.schedule.alpha[:-1], table.schedule.sigma[:-1]
    slope = table.on_x + table.on_clean * alpha / (alpha.square() + sigma.square())
    variance = torch.ones((), dtype=torch.float64)
    for factor, std in zip(slope, table.std, strict=True):
        variance = factor.square() * variance + std.square()
    return float(slope.prod() / variance.sqrt())


def measured(runs: Sequence[Run], out: Path) -> dict[str, Any]:
    """Everything that the page says."""
    config = settings_of({}, STEPS)
    target = exact_target(config, build_kernel(config, WorldPolicy(load(WORLD))))
    rows = []
    for method in METHODS:
        for sampler in SAMPLERS:
            ended = [r for r in runs if (r.method, r.sampler) == (method, sampler) and r.done(out)]
            if ended:
                found = [judge(target, trained(run, out, ROWS)) for run in ended]
                rows.append(row_of(method, sampler, found, steps=STEPS))
    exact = target.resample(ROWS, rng.generator(1, "exact"))
    return {
        "world": WORLD,
        "updates": UPDATES,
        "rows": ROWS,
        "target_reward": target.reward,
        "exact": row_of("exact draws of the target", "–", [judge(target, exact)]),
        "trained": rows,
        "limits": limits(out),
    }


def several(values: Sequence[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def line(row: dict[str, Any], goal: float) -> str:
    cells = [
        several(row["reward"], 3),
        several([goal - reward for reward in row["reward"]], 3),
        several(row["mmd"], 1),
        several(row["kl"], 3),
        several(row["swd"], 1),
    ]
    return f"| {row['label']} | {row['sampler']} | {' | '.join(cells)} |"


def tables(found: dict[str, Any]) -> str:
    """The markdown between the two marks."""
    head = "| | sampler | E[r] | below the target | MMD²/floor | mode KL | sliced W₂/floor |"
    lines = [START, "", head, "|---|---|---|---|---|---|---|"]
    lines += [line(row, found["target_reward"]) for row in [*found["trained"], found["exact"]]]
    head = "perfect training of | steps | first noise kept | E[r] (target) | MMD²/floor | mode KL"
    lines += ["", f"| {head} | untrained, MMD²/floor |", "|---|---|---|---|---|---|---|"]
    for row in found["limits"]:
        cells = (
            f"{abs(row['kept']):.3f}",
            f"{row['reward']:.3f} ({row['target_reward']:.3f})",
            f"{row['mmd']:.1f}",
            f"{row['kl']:.4f}",
            f"{row['base_mmd']:.1f}",
        )
        lines.append(f"| {row['sampler']} | {row['steps']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", END])


def picture(out: Path, path: Path) -> None:
    """The target beside what the two samplers draw after the same training."""
    config = settings_of({}, STEPS)
    target = exact_target(config, build_kernel(config, WorldPolicy(load(WORLD))))
    label = next(iter(METHODS))
    exact = target.resample(PICTURED, rng.generator(2, "exact"))
    panels = [Panel("target p·exp(βr)", exact, target.reward, target.masses)]
    for sampler in SAMPLERS:
        x = trained(Run(label, sampler, SEEDS[0]), out, PICTURED)
        panels.append(Panel(f"{label}, {sampler}", x, float(x[:, 0].mean()), None))
    limit = perfect(settings_of(SAMPLERS[FLOW_SDE], STEPS), PICTURED)
    name = f"{FLOW_SDE}, trained perfectly"
    panels.append(Panel(name, limit.x, limit.reward, limit.masses))
    mixture = load(WORLD).mixture
    draw_panels(panels, mixture, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/flow-samplers"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only-write", action="store_true", help="from the runs that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out, docs = arguments.out, arguments.docs
    runs = [Run(m, s, seed) for seed in SEEDS for m in METHODS for s in SAMPLERS]
    failures = [] if arguments.only_write else carry_out_all(runs, out, arguments.processes)
    found = measured(runs, out)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (docs / "flow_samplers.json").write_text(text + "\n", encoding="utf-8")
    insert_between(docs / "models.md", START, tables(found), END)
    picture(out, docs / "images" / "flow_samplers.png")
    if failures:
        raise SystemExit(f"{len(failures)} of {len(runs)} runs ended early")


if __name__ == "__main__":
    main()
