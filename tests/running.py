"""Whole runs through the command line, for the tests that start processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
ENTRY = str(ROOT / "train_nablagfn.py")
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
NUMBERS = [
    "--config.sampling.num_steps=10",
    "--config.model.flow_channel_width=(16,32)",
    "--config.evaluation.num_prompts=2",
    "--config.evaluation.images_per_prompt=2",
    "--config.logging.num_samples=4",
    "--config.logging.tensorboard=False",
]


def run(
    command: list[str], cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False
    )


def train(*options: str) -> list[str]:
    return [sys.executable, ENTRY, *options]


def torchrun(*options: str, processes: int = 2) -> list[str]:
    return [*LAUNCHER, f"--nproc_per_node={processes}", ENTRY, *options]


def small(model: Path | str, out: Path) -> list[str]:
    return [
        f"--config.pretrained.model={model}",
        "--config.experiment.reward_fn=colourfulness",
        f"--config.saving.output_dir={out}",
        "--config.sampling.batch_size=4",
        "--config.sampling.num_batches_per_epoch=1",
        "--config.training.gradient_accumulation_steps=1",
        "--config.model.reward_scale=100",
        *NUMBERS,
    ]


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


LEARNED = ("policy", "objective")


def weights(folder: Path, update: int, names: Sequence[str] = LEARNED) -> dict[str, torch.Tensor]:
    where = folder / "checkpoints" / f"update_{update:06d}"
    parts = (load_file(where / f"{name}.safetensors") for name in names)
    return {name: value for part in parts for name, value in part.items()}


def wait_for_updates(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        file = folder / "metrics.jsonl"
        if file.is_file() and len(file.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError("the run ended before it could be killed")
