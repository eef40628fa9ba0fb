"""Are noised samples what the sampler passes through? Table of docs/pool.md.

    python tools/noised_states.py            # 2 minutes on one core

Of the pretrained model's own paths, and of the same ends with new noise: mean ‖z̄‖², what is left of
a step's noise when x_N is known. For a sampler that is the inverse of the forward process both are
equal at every level.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from nablagfn import load_config
from nablagfn.commands.assemble import build_policy, build_prompts
from nablagfn.core import kernels, rng
from nablagfn.evaluation import draw_paths
from nablagfn.methods.build import build_kernel

SEED = 20_000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--config", default="demo")
    parser.add_argument("--images-per-prompt", type=int, default=4)
    given = parser.parse_args(arguments)
    config = load_config(given.config)
    policy = build_policy(config, torch.device("cpu"))
    table = build_kernel(config, policy)
    asked = [
        prompt for prompt in build_prompts(config).prompts for _ in range(given.images_per_prompt)
    ]
    print("| step | time | ‖z̄‖², the sampler's paths | their ends, noised |\n|---|---|---|---|")
    paths = draw_paths(policy, table, asked, range(len(asked)), seed=SEED, reference=True)
    noise = torch.randn(paths.clean.shape, generator=rng.generator(SEED, "noised"))
    for step in range(table.num_steps):
        k = table.at_step(step, paths.clean)
        noised = k.here.end_scale * paths.clean + k.here.end_std * noise
        found = []
        for x in (paths.x[:, step], noised):
            with torch.no_grad(), policy.reference():
                output = policy.output(x, k.here.time, paths.condition)
            left = kernels.bridge_noise(x, paths.clean, output, k)
            found.append(float(left.flatten(1).square().sum(1).mean()))
        print(
            f"| {step} | {float(table.time[step]):.0f} | {found[0]:.1f} | {found[1]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
