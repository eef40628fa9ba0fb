"""A run folder and its files (torch-free): the report and other readers need nothing else.

prompts.json        the prompt set                  held_out.json   prompts never trained on
config.json         every option as resolved        versions.json   packages and machine
metrics.jsonl       one line per update             diagnostics.jsonl the same by noise level
evaluation.json     before/after and evaluate       guard.json     best checkpoint, what was done
sampler.json        the times of the steps
grids/              fixed-seed sample grids         checkpoints/    update_000010/...
tensorboard/  samples/  evaluation/  report.html
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..config import Config, ConfigError, flatten, merge
from ..config.model import lora_strength

PACKAGES = ("nablagfn", "torch", "diffusers", "transformers", "peft", "accelerate")
GUARD = "guard.json"
SAMPLER = "sampler.json"  # the times of its steps, and how much each weighs in the path KL
ABOUT = "prompt_metadata.json"  # by prompt, where the prompt file says more
METRICS, DIAGNOSTICS = "metrics.jsonl", "diagnostics.jsonl"
CHANGEABLE = (
    "guard.",
    "logging.",
    "speed.",
    "saving.",
    "pretrained.family",
    "reward.weights",
    "training.num_epochs",
    "training.max_minutes",
    "training.micro_batch",
    "training.gradient_checkpointing",
    "training.vae_slice",
    "training.vae_checkpointing",
    "training.shard_base",
)


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@dataclass(frozen=True)
class RunFolder:
    """Names of the files of one run, and how they are read and written."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def grids(self) -> Path:
        return self.path / "grids"

    @property
    def evaluation(self) -> Path:
        """Samples of evaluated models: base/, update_000010/, …"""
        return self.path / "evaluation"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def exists(self) -> bool:
        return (self.path / "config.json").is_file()

    def lock(self) -> AbstractContextManager[Any]:
        """Hold the folder, made if need be, for this process until the context ends.

        Raises ConfigError when another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(self.path / ".lock").acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"another process is at work in {self.path}: wait for it, or give another "
                "--exp_name"
            ) from None

    def write_json(self, name: str, value: Any) -> None:
        write_atomic(self.path / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        """The content of a JSON file of the run, or None when it is not there."""
        file = self.path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def prompt_sets(self) -> tuple[list[str], list[str]]:
        """Prompts trained on, and prompts held out. Raises ConfigError when there are none."""
        prompts = self.read_json("prompts.json")
        if not prompts:
            raise ConfigError(f"{self.path} has no prompts.json: its run never started")
        return prompts, self.read_json("held_out.json") or []

    def times(self) -> list[float]:
        """The times of the run's steps, noisiest first; none of a run that kept none."""
        return (self.read_json(SAMPLER) or {}).get("times", [])

    def lora_strengths(self, config: Config) -> tuple[float, ...]:
        """How strongly the run's LoRA acts in each of its steps, as `model.lora_until` and
        `model.lora_fade` say; none: with 1 in all."""
        model = config.model
        if not model.lora_variation:
            return ()
        levels = (self.read_json(SAMPLER) or {}).get("alpha_bar", [])
        return tuple(lora_strength(level, model.lora_until, model.lora_fade) for level in levels)

    def about(self) -> dict[str, Any]:
        """The metadata of prompts that have some."""
        return self.read_json(ABOUT) or {}

    def config(self) -> Config:
        """The resolved settings. Raises ConfigError when this is not a run folder."""
        if not self.exists:
            raise ConfigError(f"{self.path} is not a run folder: it has no config.json")
        try:
            values = self.read_json("config.json")
        except ValueError as error:
            raise ConfigError(f"{self.path}/config.json is damaged: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{self.path}/config.json is damaged: it holds no settings")
        return merge(Config(), values)

    def result_checkpoint(self) -> str:
        """Name of the checkpoint that the run stands for: the guard's best, else the newest; ''."""
        names = [path.name for path in complete_checkpoints(self.checkpoints)]
        best = ((self.read_json(GUARD) or {}).get("best") or {}).get("checkpoint", "")
        return best if best in names else max(names, default="")

    def checkpoint(self, name: str = "") -> Path:
        """The folder of a checkpoint; by default of the one that the run stands for.

        Raises ConfigError when there is none (of that name).
        """
        found = {path.name: path for path in complete_checkpoints(self.checkpoints)}
        if not found or (name and name not in found):
            raise ConfigError(
                f"{self.path} has no checkpoint {name or 'yet'}; there is: "
                + (", ".join(found) or "none")
            )
        return found[name or self.result_checkpoint()]

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """One more line of a .jsonl file."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """All lines of a .jsonl file; a last line cut by a crash is left out."""
        file = self.path / name
        if not file.is_file():
            return []
        rows = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def metrics(self) -> list[dict[str, Any]]:
        """All metric rows, one per update."""
        return self.rows(METRICS)

    def diagnostics(self) -> list[dict[str, Any]]:
        """What was logged by noise level, one row per update."""
        return self.rows(DIAGNOSTICS)

    def truncate(self, updates: int) -> None:
        """Drop rows of updates after the checkpoint that a resumed run starts from."""
        for name in (METRICS, DIAGNOSTICS):
            kept = [row for row in self.rows(name) if row["update"] <= updates]
            write_atomic(self.path / name, "".join(json.dumps(row) + "\n" for row in kept))


def checkpoint_name(update: int) -> str:
    """Folder name of the checkpoint after `update` updates."""
    return f"update_{update:06d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first; whatever else lies there is none."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(r"update_\d{6,}", path.name))


def run_folder(config: Config, exp_name: str) -> RunFolder:
    """`output_dir/REWARD_NAME_seedS`, in characters that every file system takes."""
    reward = config.experiment.reward_fn.replace(":", ".")
    name = "_".join(part for part in (reward, exp_name, f"seed{config.seed}") if part)
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return RunFolder(Path(config.saving.output_dir).expanduser() / safe)


def fresh_folder(folder: RunFolder) -> RunFolder:
    """The first of NAME, NAME-2, NAME-3 … that holds no run."""
    count, candidate = 1, folder
    while candidate.exists:
        count += 1
        candidate = RunFolder(folder.path.with_name(f"{folder.path.name}-{count}"))
    return candidate


def check_same_settings(old: Config, new: Config, folder: Path) -> None:
    """Raises ConfigError when a run would be continued with settings that change its result."""
    before, after = flatten(old), flatten(new)
    free: tuple[str, ...] = CHANGEABLE
    if new.training.lr_schedule != "constant":  # the schedule ends with the last epoch
        free = tuple(key for key in CHANGEABLE if key != "training.num_epochs")
    changed = [
        f"{key} ({before[key]} -> {after[key]})"
        for key in after
        if before[key] != after[key] and not key.startswith(free)
    ]
    if changed:
        raise ConfigError(
            f"{folder} was started with other settings: {', '.join(changed)}. Give another "
            "--exp_name, or --resume=never for a new folder"
        )


def versions() -> dict[str, str]:
    """Package versions, Python, machine and command of this process."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["python"] = platform.python_version()
    found["platform"] = platform.platform()
    found["command"] = " ".join(sys.argv)
    return found
