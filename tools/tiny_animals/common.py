"""What the training scripts share: options, clocks, averages, checkpoints, batches."""

from __future__ import annotations

import argparse
import math
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def parser(
    description: str | None, minutes: float, lr: float, batch: int, work: bool = True
) -> argparse.ArgumentParser:
    """The options that all training scripts have."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if work:
        p.add_argument("--work", type=Path, required=True, help="folder of data and checkpoints")
    p.add_argument("--minutes", type=float, default=minutes, help="length of the training")
    p.add_argument("--lr", type=float, default=lr)
    p.add_argument("--batch", type=int, default=batch)
    p.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    p.add_argument("--seed", type=int, default=0)
    return p


def device_for(threads: int, name: str | None = None) -> torch.device:
    """The named device, else CUDA where there is one, else the CPU with that many threads."""
    if threads:
        torch.set_num_threads(threads)
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def save_atomic(value: Any, path: Path) -> None:
    """torch.save to a neighbouring file, then rename: a reader never sees half a file."""
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    os.replace(partial, path)


class Average:
    """Exponential moving average of a module's parameters (with a warm-up of the decay)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.values = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present weights."""
        self.steps += 1
        rate = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                self.values[key].lerp_(value, rate)
            else:
                self.values[key].copy_(value)


class Run:
    """A training that lasts a given time: learning rate, log lines, checkpoints, resuming.

    The learning rate warms up over 100 steps and falls along a cosine of the *elapsed share of
    the time budget* to 2 %, so the same script fits a laptop and a GPU.
    """

    every, talk = 120.0, 20.0  # seconds between checkpoints, between log lines

    def __init__(
        self,
        path: Path | None,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        averages: dict[str, Average],
        minutes: float,
        first: int = 0,
    ) -> None:
        """``path``: the checkpoint, gone on from where it is there; ``first``: number of step 1."""
        self.path, self.modules, self.optimizer, self.averages = path, modules, optimizer, averages
        self.budget, self.elapsed, self.step, self.first = 60 * minutes, 0.0, first, first
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.losses: dict[str, float] = {}
        self._last = self._logged = self._saved = time.monotonic()
        if path is not None and path.exists():
            self._restore(path)

    def _restore(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            raise SystemExit(f"{path}: no whole checkpoint; delete it to start anew") from None
        self.elapsed, self.step = state["elapsed"], state["step"]
        self.first = state.get("first", 0)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for name, average in self.averages.items():
            average.values.update(
                {k: v.to(average.values[k].device) for k, v in state["averages"][name].items()}
            )
            average.steps = self.step - self.first
        self.optimizer.load_state_dict(state["optimizer"])
        print(f"resumed {path.name} at step {self.step}", flush=True)

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "modules": {k: m.state_dict() for k, m in self.modules.items()},
            "averages": {k: a.values for k, a in self.averages.items()},
            "optimizer": self.optimizer.state_dict(),
            "elapsed": self.elapsed,
            "step": self.step,
            "first": self.first,
        }
        if self.path is not None:
            save_atomic(state, self.path)
        self._saved = time.monotonic()

    def steps(self) -> Iterator[int]:
        """Step numbers until the time is over; sets the learning rate before each."""
        while self.elapsed < self.budget:
            share = self.elapsed / self.budget
            factor = min(1.0, (self.step - self.first + 1) / 100) * (
                0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
            )
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            yield self.step
            self.step += 1
            now = time.monotonic()
            self.elapsed, self._last = self.elapsed + now - self._last, now
            if now - self._saved > self.every:
                self.save()
        self.save()

    def update(self, loss: Tensor, parts: dict[str, Tensor], clip: float = 1.0) -> None:
        """One optimizer step, the averages, and now and then a line with the losses and the ETA."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(params, clip)
        self.optimizer.step()
        for name, average in self.averages.items():
            average.update(self.modules[name])
        for key, value in parts.items():
            old = self.losses.get(key, float(value.detach()))
            self.losses[key] = 0.98 * old + 0.02 * float(value.detach())
        if time.monotonic() - self._logged > self.talk:
            self._logged = time.monotonic()
            self.log()

    def log(self) -> None:
        """Print the smoothed losses."""
        text = "  ".join(f"{k} {v:.4f}" for k, v in self.losses.items())
        left = (self.budget - self.elapsed) / 60
        print(f"step {self.step}  {text}  {left:.1f} min left", flush=True)


def to_images(batch: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [B, 64, 64, 3] -> float32 [B, 3, 64, 64] in [0, 1]."""
    tensor = torch.from_numpy(np.array(batch)).to(device)
    return tensor.permute(0, 3, 1, 2).float().div_(255)
