"""Metrics to every place at once: metrics.jsonl always; TensorBoard and W&B through Accelerate."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from ..config import Config, flatten
from ..runs.runfolder import DIAGNOSTICS, METRICS, RunFolder


def make_accelerator(config: Config, folder: RunFolder) -> Accelerator:
    """The process group, its device, and the trackers that the config asks for."""
    trackers = [
        name
        for name, wanted in (
            ("tensorboard", config.logging.tensorboard),
            ("wandb", config.logging.use_wandb),
        )
        if wanted
    ]
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # else several CPU processes would not connect
        log_with=trackers or None,
        project_config=ProjectConfiguration(
            project_dir=str(folder.path), logging_dir=str(folder.path / "tensorboard")
        ),
    )


class RunLog:
    """Writes on the main process only. rows, by_step: what is in its two files so far."""

    def __init__(self, accelerator: Accelerator, folder: RunFolder, config: Config) -> None:
        self.accelerator = accelerator
        self.folder = folder
        self.config = config
        self.rows: list[dict[str, Any]] = []
        self.by_step: list[dict[str, Any]] = []

    def open(self) -> None:
        """Start the trackers (creates files); read what a resumed run has logged already."""
        self.rows, self.by_step = self.folder.metrics(), self.folder.diagnostics()
        logging = self.config.logging
        flat = {
            key: value if isinstance(value, (int, float, str, bool)) else str(value)
            for key, value in flatten(self.config).items()
        }
        place = str(self.folder.path.resolve())
        wandb = {
            "name": self.folder.path.name,
            "dir": logging.wandb_dir or str(self.folder.path),
            "resume": "allow",
            "id": hashlib.blake2b(place.encode(), digest_size=8).hexdigest(),
        }
        self.accelerator.init_trackers(
            logging.proj_name,
            config=flat,
            init_kwargs={"wandb": wandb} if logging.use_wandb else {},
        )

    def write(self, update: int, row: Mapping[str, Any], by_step: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl and diagnostics.jsonl, and one point of every curve."""
        if self.accelerator.is_main_process:
            finite = {  # strict JSON has no infinity (a skipped fp16 step has such a gradient)
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in row.items()
            }
            self.rows.append({"update": update, **finite})
            self.by_step.append({"update": update, **by_step})
            self.folder.append(METRICS, self.rows[-1])
            self.folder.append(DIAGNOSTICS, self.by_step[-1])
        self.accelerator.log(dict(row), step=update)
