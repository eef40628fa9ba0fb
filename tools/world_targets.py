"""What the sampler's target is in each world, as a table: docs/worlds.md has that of some.

python tools/world_targets.py ring far-mode          # no names: every world, minutes
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from nablagfn import worlds
from nablagfn.methods.build import build_kernel
from nablagfn.recipes.options import load_config
from nablagfn.worlds.measures import mode_masses
from nablagfn.worlds.policy import WorldPolicy
from nablagfn.worlds.target import Target

HEAD = """| world | prompt | E[r] | `target_ess` / samples | masses of the modes in % |
|---|---|---|---|---|"""


def row(target: Target) -> str:
    """From the pretrained sampler → to its target."""
    mixture, count = target.world.mixture, len(target.base)
    before = mode_masses(mixture.mode_of(target.base), len(mixture))
    shares = (
        ", ".join(f"{100 * m:.1f}" for m in some.tolist()) for some in (before, target.masses)
    )
    return (
        f"| `{target.world.name}` | {target.prompt} "
        f"| {float(target.rewards.mean()):.3f} → {target.reward:.3f} "
        f"| {target.effective_size / count:.2f} | {' → '.join(shares)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("worlds", nargs="*", default=worlds.names())
    print(HEAD)
    for name in parser.parse_args().worlds:
        world = worlds.load(name)
        table = build_kernel(load_config(world.name), WorldPolicy(world))
        for prompt in world.prompts:
            print(row(Target.of(world, table, prompt)), flush=True)


if __name__ == "__main__":
    main()
