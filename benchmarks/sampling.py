"""The rollout alone: cost against steps, batch and guidance.

python benchmarks/sampling.py [--model tiny-animals] [--steps 10 20] [--batches 1 4 16]
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import device, machine, parser, report
from update import settings

from nablagfn.commands.assemble import build_policy, build_prompts
from nablagfn.commands.planner import synchronise
from nablagfn.config import Config, set_option
from nablagfn.core import rng
from nablagfn.core.rollout import rollout
from nablagfn.methods.build import build_kernel
from nablagfn.recipes.options import load_config


def seconds(config: Config, repeats: int) -> list[float]:
    """Of each rollout of one batch; one before them is not counted."""
    place, size = device(), config.sampling.batch_size
    policy = build_policy(config, place)
    table = build_kernel(config, policy)
    prompts = build_prompts(config).spread(size)
    noise = rng.normal(
        (table.num_steps + 1, *policy.sample_shape), range(size), seed=0, purpose="benchmark"
    )
    where, found = policy.condition(prompts, ()), []
    for _ in range(repeats + 1):
        synchronise(place)
        started = time.perf_counter()
        rollout(policy, table, noise, where)
        synchronise(place)
        found.append(time.perf_counter() - started)
    return found[1:]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="sd15" if torch.cuda.is_available() else "tiny-animals")
    p.add_argument("--steps", nargs="+", type=int, default=[10, 20])
    p.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    p.add_argument("--guidance", nargs="+", type=float, default=[1.0, 5.0])
    p.add_argument("--repeats", type=int, default=5)
    arguments = p.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        name, base = settings(arguments.model, Path(folder))
        for n, batch, guidance in itertools.product(
            arguments.steps, arguments.batches, arguments.guidance
        ):
            config = load_config(name)
            sizes = {"sampling.num_steps": n, "sampling.batch_size": batch}
            for key, value in {**base, **sizes, "sampling.guidance_scale": guidance}.items():
                set_option(config, key, value)
            middle = statistics.median(seconds(config, arguments.repeats))
            rows.append(
                {
                    "steps": n,
                    "batch": batch,
                    "guidance": guidance,
                    "s/rollout": f"{middle:.3f}",
                    "ms per step and picture": f"{1e3 * middle / n / batch:.2f}",
                }
            )
    report({"machine": machine(), "rows": rows}, rows, arguments.out)


if __name__ == "__main__":
    main()
