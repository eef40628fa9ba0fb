"""The settings of `make demo`: seconds, figures, pictures."""

from __future__ import annotations

import time
from typing import Any

import torch
from one_update import memory as peak

from nablagfn.commands.assemble import build_trainer, side_by_side
from nablagfn.config import set_option
from nablagfn.recipes.options import load_config
from nablagfn.runs.runfolder import RunFolder

from .child import Setup
from .rows import PICTURE

LESS = {  # for a rehearsal
    "training.num_epochs": 1,
    "sampling.num_steps": 5,
    "sampling.batch_size": 4,
    "training.batch_size": 4,
    "evaluation.num_prompts": 2,
    "evaluation.images_per_prompt": 2,
    "logging.num_samples": 4,
}


def demo(setup: Setup) -> dict[str, Any]:
    config = load_config("demo")
    for key, value in (LESS if setup.small else {}).items():
        set_option(config, key, value)
    started = time.perf_counter()
    result = build_trainer(config, RunFolder(setup.work / "demo")).fit()
    seconds = time.perf_counter() - started
    prompts = ("a lion", "a bear") if setup.small else ("a lion", "a bear", "a frog", "a raccoon")
    seeds = range(2 if setup.small else 8)
    side_by_side(
        RunFolder(result.folder), prompts=prompts, seeds=list(seeds), out=setup.out / PICTURE
    )
    rows = RunFolder(result.folder).metrics()
    return {
        "seconds": seconds,
        "updates": result.updates,
        "seconds of updates": [row["seconds"] for row in rows],
        "before": result.before.as_dict() if result.before else None,
        "after": result.after.as_dict() if result.after else None,
        "peak": peak(torch.device(setup.device)),
        "picture": PICTURE,
    }


CASES = {"demo": demo}
