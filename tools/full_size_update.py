"""One update at full size: SD1.5 and a reward by their true architectures, random weights.

Prints what it took in time and memory:

    python tools/full_size_update.py aesthetic|hpsv2|imagereward [OUT_FOLDER]

It answers: does the whole graph fit and run, and what does it cost? Everything is as in
config/NAME.py except how much is drawn: one trajectory of two steps, both learnt from. The words
are letters (no vocabulary is shipped), which changes no shape.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from nablagfn import PromptSet, StableDiffusionPolicy, Trainer, load_config
from nablagfn.commands.architectures import REWARDS
from nablagfn.models.architectures import random_sd15
from nablagfn.rewards import NamedReward
from nablagfn.runs.runfolder import RunFolder


def millions(*modules: torch.nn.Module) -> float:
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def peak_gib(device: torch.device) -> float:
    """Of the device's memory; of the process's on a CPU (Linux counts KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(name: str, out: str) -> None:
    torch.manual_seed(0)
    config = load_config(name)
    config.training.batch_size = 1
    config.training.gradient_accumulation_steps = 1
    config.training.num_epochs = 1
    config.training.gradient_checkpointing = True
    config.sampling.batch_size = config.sampling.num_batches_per_epoch = 1
    config.sampling.num_steps = 2
    config.model.timestep_fraction = 1.0
    config.evaluation.num_prompts = 0
    config.logging.sample_freq = 0
    config.logging.tensorboard = False
    config.saving.output_dir = out
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = random_sd15().to(device)
    reward = REWARDS[name]().to(device)
    policy = StableDiffusionPolicy(pipeline, name="sd15-random", gradient_checkpointing=True)
    built = peak_gib(device)
    started = time.perf_counter()
    trainer = Trainer(
        policy,
        NamedReward(name, reward),
        PromptSet(("a red car", "two dogs")),
        config,
        folder=RunFolder(Path(out) / name),
    )
    trainer.fit()
    (row,) = trainer.folder.metrics()
    figures = {
        "reward": name,
        "U-Net, millions": round(millions(pipeline.unet), 1),
        "reward, millions": round(millions(reward), 1),
        "device": str(device),
        "seconds": round(time.perf_counter() - started, 1),
        "GiB with everything loaded": round(built, 1),
        "GiB at the peak": round(peak_gib(device), 1),
        "guess_sq": row["guess_sq"],
        "grad_norm": row["grad_norm"],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
