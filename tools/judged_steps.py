"""What each estimate says that a run's steps are worth, on pretrained paths of a pool with looks.

    python tools/judged_steps.py RUN                        # of its own pool; minutes on one core
    python tools/judged_steps.py RUN --paths-of OTHER       # of another run's: held out

d(x_k) is how a checkpoint moves the mean of a step, in units of σ_k. What it is worth is
E[w z·d] − ½E[w‖d‖²], summed over the steps: so much nearer it brings the target (KL(p*‖p_θ), nats).
The first term by three estimates: w and the noise z that the step had, which is exact and noisy;
the noise that the path's end tells of it, ρz̄ (`pool.looks=0`); and judged by later looks.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from nablagfn.commands.assemble import build_policy, build_trainer
from nablagfn.core import kernels
from nablagfn.core.types import Judged, Policy
from nablagfn.methods.build import build_kernel
from nablagfn.runs.runfolder import RunFolder
from nablagfn.training.checkpoint import load_policy
from nablagfn.training.collect import ignored
from nablagfn.training.pool import Draw, PoolCollector, mean_one


def moved(policy: Policy, made: PoolCollector, draw: Draw, step: int) -> Tensor:
    """d at the step, [n, ...]."""
    found = []
    for rows in torch.arange(len(draw.x)).split(60):
        x = draw.x[rows, step]
        k = made.table.at_step(step, x)
        asked = [made.slots[i] for i in draw.slot[rows].tolist()]
        with torch.no_grad():
            output = policy.output(x, k.here.time, policy.condition(asked, ()))
        found.append(kernels.moved_mean(output, draw.output_ref[rows, step], k))
    return torch.cat(found)


def estimates(
    made: PoolCollector, draw: Draw, weight: Tensor, judged: Judged, d: Tensor, step: int
) -> dict[str, Tensor]:
    """Of each path [n], whose mean is asked for; weight: [n] w."""
    now, then = judged.now[:, step], judged.then[:, step]
    x, x_end = draw.x[:, step], draw.x[:, -1]
    k = made.table.at_step(step, x)
    z = kernels.step_noise(x, draw.x[:, step + 1], draw.output_ref[:, step], k)
    bridged = kernels.bridge_noise(x, x_end, draw.output_ref[:, step], k) * made._slope[step]
    basis = made._directions
    along = z if basis is None else kernels.along(z, basis[step])

    def dot(noise: Tensor) -> Tensor:
        return (noise * d).flatten(1).sum(1)

    return {
        "w z": (weight - now) * dot(z),
        "(w − 1) ρz̄": (weight - 1) * dot(bridged),
        "judged": (then - now) * dot(along),
        "½w‖d‖²": 0.5 * weight * d.flatten(1).square().sum(1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoint", help="its folder's name (default: the newest)")
    parser.add_argument("--paths-of", type=Path, help="another run, whose pool is used")
    parser.add_argument("--paths", type=int, default=1800, help="of the pool, at most")
    given = parser.parse_args(arguments)
    folder = RunFolder(given.run)
    policy = build_policy(folder.config(), torch.device("cpu"))
    names = sorted(path.name for path in folder.checkpoints.iterdir() if path.is_dir())
    load_policy(policy, folder.checkpoints / (given.checkpoint or names[-1]))
    pool = RunFolder(given.paths_of or given.run)
    made = build_trainer(pool.config(), pool).collector
    if build_kernel(folder.config(), policy).time.tolist() != made.table.time.tolist():
        parser.error(f"{pool.path} has other steps than {folder.path}")
    if not isinstance(made, PoolCollector) or not made.looks:
        parser.error(f"{pool.path} has no pool with looks: give a run with config.pool.looks=6")
    (whole,) = made._filled(0, ignored)
    draw = whole.at(torch.arange(0, len(whole.x), math.ceil(len(whole.x) / given.paths)))
    weight, judged = mean_one(made._log_weight(draw), draw.slot), made._judged([draw])
    total: dict[str, float] = {}
    error: dict[str, float] = {}
    for step in range(made.table.num_steps):
        d = moved(policy, made, draw, step)
        found = estimates(made, draw, weight, judged, d, step)
        if not step:
            print("| step | " + " | ".join(found) + " |\n|---" + "|---" * len(found) + "|")
        for name, value in found.items():
            total[name] = total.get(name, 0.0) + float(value.mean())
            error[name] = error.get(name, 0.0) + float(value.var()) / len(value)
        row = " | ".join(f"{float(value.mean()):.3f}" for value in found.values())
        print(f"| {step} | {row} |", flush=True)
    row = " | ".join(f"{total[name]:.3f} ± {error[name] ** 0.5:.3f}" for name in total)
    print(f"| all | {row} |")


if __name__ == "__main__":
    main()
