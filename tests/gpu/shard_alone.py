"""What test_whole_runs.py runs on one process: an update of a whole model and of a sharded one.

torchrun --nproc_per_node=1 tests/gpu/shard_alone.py MODEL OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from nablagfn import report
from nablagfn.models import shard
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.rewards import analytic
from nablagfn.runs.runfolder import RunFolder
from nablagfn.runtime.distributed import process_state
from nablagfn.training.trainer import Trainer
from tests.test_trainer import PROMPTS, small_config

OPTIONS = {
    "training.num_epochs": 1,
    "training.allow_tf32": False,
    "training.adam_epsilon": 1.0,
    "training.lr": 0.1,
}


def trained(model: str, out: Path, *, sharded: bool) -> Trainer:
    config = small_config(out, **OPTIONS, **{"training.shard_base": sharded})
    policy = StableDiffusionPolicy.from_pretrained(
        model, guidance_scale=config.sampling.guidance_scale, shard=sharded
    )
    trainer = Trainer(
        policy, analytic.colourfulness, PROMPTS, config, folder=RunFolder(out), show_progress=False
    )
    trainer.fit()
    return trainer


def main(model: str, out: Path) -> None:
    process_state()
    shard.check_several = lambda processes: None  # one is refused elsewhere: nothing to gain
    whole = trained(model, out / "whole", sharded=False)
    parts = trained(model, out / "sharded", sharded=True)
    known, found = whole.policy.state_dict(), parts.policy.state_dict()
    moved = [float(v.abs().max()) for name, v in known.items() if "lora_B" in name]
    worst = [float((found[name] - value).abs().max()) for name, value in known.items()]
    rows = [t.folder.metrics()[0]["loss"] for t in (whole, parts)]
    held = sum(isinstance(p, DTensor) for p in parts.policy.network.parameters())
    figures = {
        "device": parts.policy.device.type,
        "backend": torch.distributed.get_backend(),
        "sharded parts": held,
        "whole loss": rows[0],
        "loss": rows[1],
        "moved": max(moved),
        "worst": max(worst),
    }
    (out / "found.json").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # it ends the process group, too
    report.build = lambda folder: None
    main(sys.argv[1], Path(sys.argv[2]))
