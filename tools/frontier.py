"""Every method beside the exact target on tiny-animals, at an equal time: docs/frontier.md.

    python tools/frontier.py --out runs/pictures        # two hours on two cores

A queue of runs of `nablagfn train`, most important first: the recipe of `make demo` by three seeds,
every method for the same minutes of one core, and longer runs with larger LoRAs. A run that ended
is kept, one that was cut off goes on where it stood, and what has not been run stays empty in the
page. OUT/target is the best there is, by `nablagfn target`; docs/frontier.md, its plots and
OUT/comparison.html are written from these files alone.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one run per core; two threads each would crawl

from frontier_page import write  # threads are set before anything loads torch
from frontier_run import MEASURED, Run, Study
from proofs import carry_out_all

from nablagfn.commands.target import TargetRequest, TargetResult, state_target
from nablagfn.recipes.options import load_config
from nablagfn.report import compare

BETA = 6.0
BETAS = (0.5, 1.0, 2.0, 3.0, 4.0, BETA, 9.0)  # of the frontier
MINUTES = 8.0  # of one core, for each method
SEEDS = (0, 1, 2)

ON_POLICY: dict[str, object] = {  # the settings of `demo`, with the reward and the β of `warmth`
    "experiment.reward_fn": "warmth",
    "model.reward_scale": BETA,
    "training.num_epochs": 10_000,  # the minutes end it
    "logging.eval_freq": 4,
}
LAMBDA = {"experiment.method": "nabla-db-lambda", "model.reward_adaptive_mode": "none"}
RIVALS: dict[str, dict[str, object]] = {
    "residual ∇-DB (paper)": {},
    "no_flow (paper)": {"model.no_flow": True},
    "∇-DB(λ)": {**LAMBDA, "method.window": 5, "method.return_lambda": 0.9},
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
ALONG_PATHS: dict[str, object] = {
    "training.num_epochs": 120,
    "pool.gradient": "carried",
    "pool.images_per_prompt": 8,
    "pool.shift_start": False,
}
LINEAR, CARRIED, NOISE = "∇-DB on a pool, linear fit", "∇-DB on a pool", "reward-weighted"
POOLED: dict[str, dict[str, object]] = {  # the settings of `warmth`
    LINEAR: {"logging.eval_freq": 10},  # the recipe itself
    CARRIED: {**PROBED, **ALONG_PATHS},
    NOISE: {
        **PROBED,
        **ALONG_PATHS,
        "experiment.method": "reward-weighted",
        "pool.looks": 6,
    },
}
LONG: dict[str, object] = {
    **PROBED,
    "pool.size": 720,
    "pool.images_per_prompt": 30,
    "training.num_epochs": 120,
}
LARGER: dict[str, dict[str, object]] = {
    "rank 16, all layers": {"model.lora_rank": 16, "model.lora_targets": "all"},
    "rank 8, attention": {},
    "rank 64, all layers": {"model.lora_rank": 64, "model.lora_targets": "all"},
}
FIRST = (
    "residual ∇-DB (paper)",
    LINEAR,
    "Adjoint Matching",
    "DDPO",
    "DRaFT-4",
    "∇-DB(λ)",
    NOISE,
)


def queue() -> list[Run]:
    """All runs, most important first."""
    methods = {
        **{label: method(label, "demo", {**ON_POLICY, **own}) for label, own in RIVALS.items()},
        **{label: method(label, "warmth", own) for label, own in POOLED.items()},
    }
    longer = [
        Run("long", label, "warmth", tuple({**LONG, **own}.items()))
        for label, own in LARGER.items()
    ]
    return [
        *(Run("demo", "make demo", "warmth", seed=seed) for seed in SEEDS),
        *(methods[label] for label in FIRST),
        longer[0],
        *(run for label, run in methods.items() if label not in FIRST),
        *longer[1:],
    ]


def method(label: str, recipe: str, options: Mapping[str, object]) -> Run:
    return Run("method", label, recipe, tuple(options.items()), minutes=MINUTES)


def best(out: Path) -> TargetResult:
    """The target of all runs, of the prompts that they are measured on; drawn as far as it is not
    there."""
    prompts = MEASURED["evaluation.num_prompts"]
    return state_target(
        load_config("warmth"),
        TargetRequest(betas=BETAS, images_per_prompt=32, num_prompts=prompts, out=out / "target"),
    )


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
    study = Study(queue(), arguments.out, BETA, MINUTES, LINEAR, FIRST[0])
    print(f"wrote {write(study, arguments.docs, target)}")
    done = [run.folder(arguments.out) for run in queue() if run.done(arguments.out)]
    if done:  # the same as `nablagfn report RUN… --out …`
        page = compare(done, arguments.out / "comparison.html", target.folder)
        print(f"wrote {page}")
    if failures:
        raise SystemExit(f"{len(failures)} runs ended early")


if __name__ == "__main__":
    main()
