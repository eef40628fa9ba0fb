"""One run of tools/proofs.py: what defines it, where it lies, and whether it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nablagfn.runs.runfolder import RunFolder

PROBES = {"claim": 5, "compared": 4, "study": 1}  # measurements of each run, by table
RECORD = "proof.json"


def safe_name(*parts: str) -> str:
    """Labels in characters that a folder's name can have."""
    return "-".join("".join(c if c.isalnum() else " " for c in " ".join(parts)).split())


def folder_of(out: Path, world: str, experiment: str, seed: int) -> RunFolder:
    """Where `train_arguments` with saving.output_dir=out puts its run."""
    return RunFolder(out / f"worlds-{world}_{experiment}_seed{seed}")


def reached(folder: RunFolder, updates: int) -> bool:
    """Whether a run has made its last update."""
    rows = folder.metrics()
    return bool(rows) and rows[-1]["update"] == updates


def train_arguments(
    world: str, experiment: str, seed: int, options: Mapping[str, object]
) -> list[str]:
    """Of `nablagfn`, for a run in a world."""
    return [
        "train",
        f"--config=worlds/{world}",
        f"--seed={seed}",
        f"--exp_name={experiment}",
        *(f"--config.{key}={value}" for key, value in options.items()),
    ]


@dataclass(frozen=True)
class Run:
    """One training: which table it belongs to, and everything that defines it."""

    table: str
    world: str
    label: str
    seed: int
    updates: int
    options: tuple[tuple[str, object], ...]

    @property
    def experiment(self) -> str:
        """The label in characters that a folder's name can have."""
        return safe_name(self.label, str(self.updates))

    def folder(self, out: Path) -> RunFolder:
        return folder_of(out / self.table, self.world, self.experiment, self.seed)

    def done(self, out: Path) -> bool:
        """Whether it ended with figures: the last probe's, and for the claim a picture."""
        record = self.folder(out).read_json(RECORD)
        ended = reached(self.folder(out), self.updates)  # a stopped run has a record, too
        return record is not None and not record["diverged"] and ended

    def arguments(self, out: Path) -> list[str]:
        pictured: dict[str, object] = {"evaluation.num_prompts": 0} if self.table != "claim" else {}
        options = {
            **pictured,
            **dict(self.options),
            "training.num_epochs": self.updates,
            "logging.sample_freq": max(1, self.updates // PROBES[self.table]),
            "logging.save_freq": self.updates,
            "saving.output_dir": out / self.table,
        }
        return train_arguments(self.world, self.experiment, self.seed, options)
