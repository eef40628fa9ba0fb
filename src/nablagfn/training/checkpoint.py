"""Checkpoints: everything with state, written atomically; resuming is the normal start.

update_000010/pytorch_lora_weights.safetensors   for diffusers' load_lora_weights
update_000010/policy.safetensors                 the same weights by the trainer's names
update_000010/objective.safetensors              g_φ and whatever else the objective owns
update_000010/optimizer.pt, state.json           moments; position, guard
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..core.types import Policy
from ..runs.runfolder import checkpoint_name, complete_checkpoints
from .guard import Guard


@dataclass(frozen=True)
class Position:
    """How far a run is: epochs and updates done, and seconds spent so far."""

    epoch: int = 0
    update: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """State at the start of an epoch, to leave a run from in the middle of it."""

    position: Position
    policy: dict[str, Any]
    modules: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    guard: dict[str, Any]


@dataclass
class CheckpointIO:
    """Saves and loads the registered parts of a run under `folder`.

    Keeps the newest `limit`, and the one that the guard calls the best.
    """

    folder: Path
    policy: Policy
    modules: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    scaler: Any
    guard: Guard
    limit: int = 5

    def save(self, position: Position) -> Path:
        """Write a checkpoint; it appears under its name only when complete."""
        target = self.folder / checkpoint_name(position.update)
        temporary = self.folder / f".{target.name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self.policy.save(temporary)
        save_file(_plain(self.policy.state_dict()), temporary / "policy.safetensors")
        save_file(_plain(self.modules.state_dict()), temporary / "objective.safetensors")
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        torch.save(state, temporary / "optimizer.pt")
        where = {**asdict(position), "guard": self.guard.state_dict()}
        (temporary / "state.json").write_text(json.dumps(where), encoding="utf-8")
        if target.exists():  # written by a run that was killed after this very point
            _remove(target)
        os.replace(temporary, target)
        for old in complete_checkpoints(self.folder)[: -self.limit]:
            if old.name != self.guard.best_checkpoint:
                _remove(old)
        return target

    def snapshot(self, position: Position) -> Snapshot:
        """A copy, in memory, of everything that `save` would write."""
        return Snapshot(
            position,
            copy.deepcopy(self.policy.state_dict()),
            copy.deepcopy(self.modules.state_dict()),
            copy.deepcopy(self.optimizer.state_dict()),
            dict(self.scaler.state_dict()),
            copy.deepcopy(self.guard.state_dict()),
        )

    def restore(self, snapshot: Snapshot) -> Position:
        """Go back to where the snapshot was taken."""
        self.policy.load_state_dict(snapshot.policy)
        self.modules.load_state_dict(snapshot.modules)
        self.optimizer.load_state_dict(snapshot.optimizer)
        self.scaler.load_state_dict(snapshot.scaler)
        self.guard.load_state_dict(snapshot.guard)
        return snapshot.position

    def load_latest(self) -> Position:
        """Restore the newest checkpoint; the start of the run when there is none."""
        found = complete_checkpoints(self.folder)
        if not found:
            return Position()
        newest = found[-1]
        load_policy(self.policy, newest)
        self.modules.load_state_dict(load_file(newest / "objective.safetensors"))
        state = torch.load(newest / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run went without loss scaling, as on a CPU
            self.scaler.load_state_dict(state["scaler"])
        where = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        self.guard.load_state_dict(where.pop("guard"))
        return Position(**where)


def load_policy(policy: Policy, checkpoint: Path) -> None:
    """Restore θ only, for sampling."""
    policy.load_state_dict(load_file(checkpoint / "policy.safetensors"))


def guard_factor(checkpoint: Path) -> float:
    """What the guard multiplied β by when the checkpoint was written; 1 before there was one."""
    where = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return float(where.get("guard", {}).get("factor", 1.0))


def _remove(checkpoint: Path) -> None:
    """Move it out of sight first: a crash leaves no half-removed checkpoint under its name."""
    aside = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    shutil.rmtree(aside)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}
