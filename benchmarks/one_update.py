"""One variant in a fresh process, for the other benchmarks: python one_update.py JOB

JOB is JSON: config (a name), options (dotted), updates, size (of the latents; 0: the model's own),
mode (time, flops or profile). Prints one line of JSON. Uses what every revision of the package has,
so that an older one can be measured by the same script.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nablagfn.commands.assemble import build_policy, build_prompts, build_reward
from nablagfn.config import Config, set_option
from nablagfn.recipes.options import load_config
from nablagfn.runs.runfolder import RunFolder
from nablagfn.runtime.distributed import process_state
from nablagfn.training.trainer import Trainer


def make_config(job: dict[str, Any], folder: str) -> Config:
    config = load_config(job["config"])
    options = {"saving.output_dir": folder, "training.num_epochs": job["updates"]}
    for key, value in {**options, **job["options"]}.items():
        set_option(config, key, value)
    return config


def make_trainer(job: dict[str, Any], config: Config, folder: Path) -> Trainer:
    place = process_state().device
    policy, reward = build_policy(config, place), build_reward(config, place)
    if job.get("size"):
        policy.sample_shape = (policy.sample_shape[0], job["size"], job["size"])
    if job["mode"] == "profile":
        from phases import watched

        policy, reward = watched(policy, reward, place)
    return Trainer(
        policy, reward, build_prompts(config), config, folder=RunFolder(folder), show_progress=False
    )


def optimizer_of(trainer: Any) -> torch.optim.Optimizer:
    """Older revisions have no `updater`."""
    return getattr(trainer, "updater", trainer).optimizer


def memory(place: torch.device) -> int:
    """Peak bytes: of the device, or of this process on a CPU (Linux counts KiB)."""
    if place.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Anywhere:
    """In place of the counter's tracker of modules, whose hooks torch.autograd.grad refuses."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def now(place: torch.device) -> tuple[float, float]:
    """Seconds on the clock, and of this process's own work, which other processes do not slow."""
    if place.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def run(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(job, folder)
        where = Path(job.get("folder") or folder) / "run"
        trainer = make_trainer(job, config, where)
        place = process_state().device
        built = memory(place)
        if job["mode"] == "flops":
            counter = FlopCounterMode(display=False)
            counter.mod_tracker = Anywhere()
            # attention by plain products, which the counter knows on every device
            with sdpa_kernel(SDPBackend.MATH), counter:
                trainer.fit()
            return {"flops": counter.get_total_flops() / job["updates"]}
        if job["mode"] == "profile":
            from phases import profile

            return profile(trainer, optimizer_of(trainer))
        marks: list[tuple[float, float]] = []
        optimizer_of(trainer).register_step_post_hook(lambda *a: marks.append(now(place)))
        trainer.fit()
        rows = trainer.folder.metrics()
        return {
            # from step to step: the first update is a warm-up
            "seconds": [b[0] - a[0] for a, b in itertools.pairwise(marks)],
            "processor seconds": [b[1] - a[1] for a, b in itertools.pairwise(marks)],
            "built": built,
            "peak": memory(place),
            "model_evals": rows[-1]["model_evals"],
            "decode_evals": rows[-1]["decode_evals"],
            "loss": rows[0]["loss"],
            "paths": config.training.batch_size * config.training.gradient_accumulation_steps,
        }


if __name__ == "__main__":
    found = run(json.loads(sys.argv[1]))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))
