"""From the costs of the parts to the peak, and to the settings that fit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from ...config import Config, ConfigError, flatten
from ...methods.registry import find_method
from ...runtime.costs import Cost
from .parts import NOTHING, Costs, measure
from .work import Passes, Price, Work, total, update_passes, work_of

CONTEXT = 0.6e9  # bytes of a CUDA context and its libraries; assumed, not measured
SLACK = 1.1  # on what comes and goes: fragmentation, workspaces; assumed, not measured
ENOUGH = 4  # rows per forward pass from which more gain little; assumed, not measured


@dataclass(frozen=True)
class Setting:
    """What the planner may choose. None of it changes results beyond rounding."""

    micro_batch: int
    gradient_checkpointing: bool
    vae_slice: int
    sampling_batch: int


def moments(config: Config, parts: Costs, work: Work, setting: Setting) -> dict[str, float]:
    """Count the bytes beside the fixed ones at each moment of an epoch."""
    s, t, p = config.sampling, config.training, parts
    paths = s.batch_size * s.num_batches_per_epoch
    path = (2 * s.num_steps + 1) * p.sample  # x and ε_θ† of every step
    used = t.batch_size * t.gradient_accumulation_steps
    held = paths * path + used * (path + 3 * work.transitions * p.sample)
    batch = setting.sampling_batch
    piece = min(batch, setting.vae_slice or batch)
    decoding = batch * p.decode_free.held + piece * p.decode_free.passing
    scoring = batch * (p.decode_free.held + p.reward_free.peak) + p.visiting
    found = {
        "drawing": 2 * paths * path + SLACK * batch * (p.eps_free.peak + path),
        "rewards of the epoch": paths * path + SLACK * max(decoding, scoring),
    }
    if p.encoding:
        found["encoding prompts"] = p.encoding
    for name, value in _update(config, parts, setting).items():
        found[f"update, {name}"] = held + SLACK * value
    return found


def _update(config: Config, parts: Costs, setting: Setting) -> dict[str, float]:
    """Count the bytes of graphs, and of what passes, of one micro-batch."""
    p, rows = parts, setting.micro_batch
    eps = p.eps_checkpointed if setting.gradient_checkpointing else p.eps
    method = find_method(config.experiment.method)
    flow = p.flow if method.learns_flow(config) else NOTHING  # they may be another method's parts
    alive = method.alive(config)
    alone = alive.alone * eps.held + 2 * flow.held + max(eps.passing, flow.passing)
    found = {"the rest": rows * alone}
    if alive.with_reward is None:
        return found
    piece = min(rows, setting.vae_slice or rows)
    kept = rows * (alive.with_reward * eps.held + 2 * flow.held * alive.kept)
    if alive.kept and piece == rows:
        kept += rows * p.decode.held + _on_the_way_back(p, eps, rows)
    else:  # decoder and reward are gone before the way back through the U-Net
        scored = piece * (p.decode.held + p.reward.peak) + p.visiting
        decoded = max(scored, piece * p.decode.peak)
        kept += max(decoded, rows * eps.passing)
    return {"reward's gradient": kept, **found}


def _on_the_way_back(p: Costs, eps: Cost, rows: int) -> float:
    """Count what the way back takes beside the graphs of U-Net and decoder, in bytes."""
    others = max(eps.passing, p.decode.passing)
    if p.visiting:  # it is differentiated and gone before the way back
        return max(rows * p.reward.peak + p.visiting, rows * others)
    return rows * (p.reward.held + max(others, p.reward.passing))


@dataclass(frozen=True)
class RunPlan:
    """setting: None when nothing fits; then the figures are those of the smallest setting.

    passes: of one update and process, by part. prices: FLOPs of one pass of each.
    """

    setting: Setting | None
    usable: float
    fixed: Mapping[str, float]
    moments: Mapping[str, float]
    passes: Mapping[str, Passes]
    prices: Mapping[str, Price]

    @property
    def eps(self) -> float:
        """Guided evaluations of one update and process, forward and backward."""
        unet = self.passes["U-Net"]
        return self.passes["drawing"].forward + unet.forward + unet.backward

    @property
    def flops(self) -> float:
        """The FLOPs of one update and process."""
        return total(self.passes, self.prices)

    @property
    def peak(self) -> float:
        """The most bytes in use at any moment."""
        return sum(self.fixed.values()) + max(self.moments.values())

    def options(self, config: Config) -> dict[str, Any]:
        """The options that set it, by dotted name; those that `config` has already left out."""
        if self.setting is None:
            return {}
        chosen, s = self.setting, config.sampling
        drawn = s.batch_size * s.num_batches_per_epoch
        wanted = {
            "training.micro_batch": chosen.micro_batch,
            "training.gradient_checkpointing": chosen.gradient_checkpointing,
            "training.vae_slice": chosen.vae_slice,
            "sampling.batch_size": chosen.sampling_batch,
            "sampling.num_batches_per_epoch": drawn // chosen.sampling_batch,
        }
        has = flatten(config)
        return {key: value for key, value in wanted.items() if value != has[key]}


def free_memory(device: torch.device) -> float:
    """Return how many bytes this process could still take on the device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available)


def parse_memory(text: str) -> float:
    """'24GB' (10^9), '24GiB' (2^30), '24' (GB) -> bytes. Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB|)\s*", text)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"--memory={text}: give a number above 0 with GB, GiB, MB or MiB: 24GB")
    units = {"": 1e9, "GB": 1e9, "MB": 1e6, "GiB": 2.0**30, "MiB": 2.0**20}
    return float(found[1]) * units[found[2]]


def plan(config: Config, memory: float, device: torch.device) -> RunPlan:
    """The settings for `memory` bytes of a device like this one. Raises ConfigError like
    `measure`."""
    usable = memory - (CONTEXT if device.type == "cuda" else 0.0)
    return choose(config, measure(config, device), work_of(config), usable)


def choose(config: Config, parts: Costs, work: Work, usable: float) -> RunPlan:
    """The settings for `usable` bytes at the effective batch of `config`.

    Of three ways to save, in the order of the work that they add, the first that leaves room for
    enough rows per forward pass: none, decoding one picture at a time, and checkpointing too.
    """
    plain = setting_of(config)
    slices = replace(plain, vae_slice=1)
    ways = (plain, slices, replace(slices, gradient_checkpointing=True))
    found = [_largest(config, parts, work, usable, way) for way in ways]
    enough = min(ENOUGH, _rows(config, work))
    good = [p for p in found if p.setting and p.setting.micro_batch >= enough]
    return good[0] if good else max(found, key=lambda p: p.setting.micro_batch if p.setting else 0)


def setting_of(config: Config) -> Setting:
    """Return the setting that `config` has."""
    t = config.training
    rows = t.micro_batch or t.batch_size
    return Setting(rows, t.gradient_checkpointing, t.vae_slice, config.sampling.batch_size)


def predict(config: Config, device: torch.device) -> RunPlan:
    """The run as `config` has it. Raises ConfigError like `measure`."""
    return _planned(config, measure(config, device), work_of(config), math.inf, setting_of(config))


def _planned(config: Config, parts: Costs, work: Work, usable: float, setting: Setting) -> RunPlan:
    found = moments(config, parts, work, setting)
    prices = parts.prices(checkpointing=setting.gradient_checkpointing)
    return RunPlan(setting, usable, parts.fixed, found, update_passes(config, work), prices)


def _rows(config: Config, work: Work) -> int:
    """Transitions of one update and process."""
    t = config.training
    return round(t.batch_size * t.gradient_accumulation_steps * work.transitions)


def _largest(config: Config, parts: Costs, work: Work, usable: float, way: Setting) -> RunPlan:
    """The largest micro-batch and sampling batch that fit, saving as `way` does."""
    s, rows = config.sampling, _rows(config, work)
    splits = sorted({math.ceil(rows / n) for n in range(1, rows + 1)}, reverse=True)
    batches = [n for n in range(s.batch_size, 0, -1) if s.batch_size % n == 0]

    def tried(micro: int, batch: int) -> RunPlan:
        setting = replace(way, micro_batch=micro, sampling_batch=batch)
        return _planned(config, parts, work, usable, setting)

    batch = next((n for n in batches if tried(1, n).peak <= usable), 1)
    micro = next((n for n in splits if tried(n, batch).peak <= usable), 0)
    return tried(micro, batch) if micro else replace(tried(1, batch), setting=None)
