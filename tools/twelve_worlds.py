"""One setting in every exact world, three seeds: docs/twelve_worlds.md.

    python tools/twelve_worlds.py --out runs/twelve        # an hour and a half on two cores

Each run is `nablagfn train --config=worlds/NAME` with `SETTING`. Its last weights are judged by
three draws of 4,000 samples a prompt that training has not seen, by the upper end of a one-sided
95 % interval of their mean. The setting was chosen in `CHOSEN`; `HELD_OUT` were first run with it
afterwards. A queue: what has ended is kept, and the page says what was not run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run per core

import torch
from proofs import carry_out_all
from proofs_run import folder_of, reached, train_arguments

from nablagfn.commands.assemble import build_policy
from nablagfn.core.kernels import KernelTable
from nablagfn.evaluation import draw_paths
from nablagfn.methods.build import build_kernel
from nablagfn.runs.runfolder import RunFolder, checkpoint_name
from nablagfn.training.checkpoint import load_policy
from nablagfn.worlds import load
from nablagfn.worlds.measure import distances, floors
from nablagfn.worlds.policy import WorldPolicy
from nablagfn.worlds.target import Target

SEEDS = (0, 1, 2)
UPDATES = 1_000
BASE = 16_384  # paths of the pretrained model for each prompt
SETTING: dict[str, object] = {
    "experiment.method": "reward-weighted",
    "method.window": 0,
    "training.lr": 4e-3,
    "sampling.batch_size": 256,
    "training.batch_size": 256,
    "training.micro_batch": 2048,
    "pool.images_per_prompt": BASE,
    "pool.own_share": 0.25,
    "pool.refresh": 100,
    "pool.keep_draws": 2,
}
CHOSEN = (
    "ring",
    "ring-flow",
    "ring-quadratic",
    "gaussian",
    "mixture-16d",
    "prompts",
    "ring-saturating",
    "ring-two-peaks",
    "shapes-2d",
)
HELD_OUT = ("mixture-64d", "learned-grid", "far-mode")
DRAWS, ROWS, SEED = 3, 4_000, 77_000
QUANTILE = 2.92  # of Student's t with DRAWS − 1 degrees of freedom, at 95 %
MMD, KL = 3.0, 0.01  # the bounds
RESULT = "twelve.json"


@dataclass(frozen=True)
class Run:
    """One training: `carry_out_all`'s job."""

    world: str
    seed: int

    def folder(self, out: Path) -> RunFolder:
        return folder_of(out, self.world, "twelve", self.seed)

    def done(self, out: Path) -> bool:
        return reached(self.folder(out), UPDATES)

    def arguments(self, out: Path) -> list[str]:
        options = {
            **SETTING,
            "pool.size": BASE * len(load(self.world).prompts),
            "training.num_epochs": UPDATES,
            "logging.sample_freq": 0,
            "logging.save_freq": UPDATES // 2,
            "evaluation.num_prompts": 0,
            "saving.output_dir": out,
        }
        return train_arguments(self.world, "twelve", self.seed, options)


@dataclass(frozen=True)
class Found:
    """MMD² over its floor and the KL of the modes (of the Gaussians), of each draw."""

    mmd: tuple[float, ...]
    kl: tuple[float, ...]

    @property
    def within(self) -> bool:
        """By the upper ends."""
        return upper(self.mmd) <= MMD and upper(self.kl) <= KL

    @property
    def within_by_mean(self) -> bool:
        return mean(self.mmd) <= MMD and mean(self.kl) <= KL


def upper(values: Sequence[float]) -> float:
    """The upper end of the interval of the mean."""
    return mean(values) + QUANTILE * stdev(values) / len(values) ** 0.5


def measured(run: RunFolder) -> Found:
    """Of the last checkpoint; the worst prompt of each draw. Kept in the run's folder."""
    asked = {**SETTING, "updates": UPDATES, "rows": ROWS, "draws": DRAWS, "seed": SEED}
    known = run.read_json(RESULT)
    if known and known.get("asked") == asked:
        return Found(tuple(known["mmd"]), tuple(known["kl"]))
    config = run.config()
    policy = build_policy(config, torch.device("cpu"))
    assert isinstance(policy, WorldPolicy)
    load_policy(policy, run.checkpoints / checkpoint_name(UPDATES))
    table = build_kernel(config, policy)
    draws = [drawn(policy, table, SEED + number) for number in range(DRAWS)]
    found = Found(tuple(mmd for mmd, _ in draws), tuple(kl for _, kl in draws))
    run.write_json(RESULT, {**asdict(found), "asked": asked})
    return found


def drawn(policy: WorldPolicy, table: KernelTable, seed: int) -> tuple[float, float]:
    """MMD²/floor and KL of one draw."""
    found = []
    for prompt in policy.world.prompts:
        target = Target.of(policy.world, table, prompt)
        x = draw_paths(policy, table, [prompt] * ROWS, range(ROWS), seed=seed).clean
        figures, least = distances(target, x), floors(target, ROWS)
        kl = figures.get("mode_kl", figures.get("gaussian_kl"))
        assert kl is not None
        found.append((figures["mmd2"] / least["mmd2"], kl))
    return max(mmd for mmd, _ in found), max(kl for _, kl in found)


HEAD = """# One setting in twelve worlds

Written by `tools/twelve_worlds.py` from {done} of {wanted} runs. Method `reward-weighted` with the
policy's own paths (docs/pool.md), the same in every world: `pool.size` {base:,} for each prompt,
{updates:,} updates, the learning rate with a cosine, and

    {setting}

The setting was chosen by single runs in `ring-quadratic` and looked at in five others of the first
nine. The last three are **held out**: it was committed before they were first trained for more than
two updates.

Each cell: MMD² over its sampling floor · KL of the mode masses (`gaussian`: of the Gaussians) in
nats. Both are means of three draws of 4,000 samples a prompt, raw (no resampling), of the worst
prompt, with the upper end of the one-sided 95 % interval of that mean in brackets. The bounds are 3
and 0.01. **Of {done} runs {within} are within both by their means, {surely} also by the upper
ends**; of the {held_done} in held-out worlds {held} and {held_surely}. The targets themselves:
[worlds.md](worlds.md).

| world | seed 0 | seed 1 | seed 2 | within: means | upper ends |
|---|---|---|---|---|---|
"""


def cell(found: Found | None) -> str:
    if found is None:
        return "not run"
    mmd = f"{mean(found.mmd):.2f} ({upper(found.mmd):.2f})"
    return f"{mmd} · {mean(found.kl):.4f} ({upper(found.kl):.4f})"


def within(found: Sequence[Found]) -> tuple[int, int]:
    """How many are within the bounds by their means, and by the upper ends."""
    return sum(one.within_by_mean for one in found), sum(one.within for one in found)


def write(out: Path, page: Path) -> None:
    """The page, of the runs that are there."""
    rows: list[str] = []
    every: list[Found] = []
    held: list[Found] = []
    for world in (*CHOSEN, *HELD_OUT):
        runs = [Run(world, seed) for seed in SEEDS]
        found = [measured(run.folder(out)) if run.done(out) else None for run in runs]
        there = [one for one in found if one is not None]
        every += there
        held += there if world in HELD_OUT else []
        name = f"`{world}`" + (" (held out)" if world in HELD_OUT else "")
        cells = " | ".join(cell(one) for one in found)
        means, ends = within(there)
        rows.append(f"| {name} | {cells} | {means} of {len(there)} | {ends} of {len(there)} |")
    means, ends = within(every)
    held_means, held_ends = within(held)
    head = HEAD.format(
        done=len(every),
        wanted=len(SEEDS) * len(rows),
        updates=UPDATES,
        base=BASE,
        setting="\n    ".join(f"--config.{key}={value}" for key, value in SETTING.items()),
        within=means,
        surely=ends,
        held_done=len(held),
        held=held_means,
        held_surely=held_ends,
    )
    page.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"wrote {page}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/twelve"))
    parser.add_argument("--page", type=Path, default=Path("docs/twelve_worlds.md"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worlds", nargs="*", default=[*CHOSEN, *HELD_OUT])
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--only-write", action="store_true", help="from the runs that are there")
    arguments = parser.parse_args()
    wanted = [Run(world, seed) for seed in arguments.seeds for world in arguments.worlds]
    failures = []
    if not arguments.only_write:
        failures = carry_out_all(wanted, arguments.out, arguments.processes)
    write(arguments.out, arguments.page)
    if failures:
        raise SystemExit(f"{len(failures)} runs ended early")


if __name__ == "__main__":
    main()
