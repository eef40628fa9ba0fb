"""The README's commands by the command line, one update each, with SD1.5's files at full size."""

from __future__ import annotations

import re
import shlex
import time
from functools import partial
from typing import Any

import torch
from common import QUIET
from one_update import memory as peak

from nablagfn.cli import main
from nablagfn.runs.runfolder import RunFolder

from .child import Case, Setup
from .runner import ROOT
from .subject import save_sd15

NAMES = ("default", "fast", "fewer_gpus", "fewer_gpus_no_flow_correction")
ONE_UPDATE = {"default": {"sampling.num_batches_per_epoch": 2}}  # of its two an epoch


def flags(name: str) -> list[str]:
    """What stands behind train_nablagfn.py in the README's command of that --exp_name."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^torchrun .*train_nablagfn\.py (.*)$", readme, flags=re.MULTILINE)
    (found,) = (line for line in lines if line.endswith(f"--exp_name={name}"))
    return shlex.split(found)


def command(setup: Setup, *, name: str) -> dict[str, Any]:
    """Seconds from the command to its end, of which `update`: from the first draw to the step."""
    device = torch.device(setup.device)
    options: dict[str, Any] = {
        **QUIET,
        "training.num_epochs": 1,
        "saving.output_dir": str(setup.work / "commands"),
        **ONE_UPDATE.get(name, {}),
    }
    if setup.small:
        options |= {
            "pretrained.model": "tiny-animals",
            "experiment.reward_fn": "tiny-aesthetic",
            "sampling.num_steps": 5,
            "sampling.batch_size": 4,
            "sampling.num_batches_per_epoch": 1,
            "training.gradient_accumulation_steps": 1,
        }
    else:
        folder = save_sd15(setup.work / "weights", device)
        options |= {"pretrained.model": str(folder / "sd15"), "reward.weights": str(folder)}
    started = time.perf_counter()
    main(["train", *flags(name), *(f"--config.{key}={value}" for key, value in options.items())])
    seconds = time.perf_counter() - started
    reward = "tiny-aesthetic" if setup.small else "aesthetic"
    (row,) = RunFolder(setup.work / "commands" / f"{reward}_{name}_seed0").metrics()
    return {"seconds": seconds, "update": row["seconds"], "peak": peak(device), "metrics": row}


CASES: dict[str, Case] = {name: partial(command, name=name) for name in NAMES}
