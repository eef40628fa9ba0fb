"""How often an update evaluates, decodes and scores, and how often a run's measurements do."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ... import worlds
from ...config import Config
from ...core.counting import Counts, counted
from ...methods.build import build_kernel, build_objective
from ...methods.parts import Parts as MethodParts
from ...methods.registry import source_of
from ...prompts import PromptSet
from ...rewards import NamedReward
from ...training.draws import Shelf
from ...training.pool import collector_of
from ...worlds.policy import WorldPolicy, WorldReward


@dataclass(frozen=True)
class Work:
    """What one path of an update takes: guided evaluations and decodes, forward and backward apart.

    transitions: how many are learned from. flow: samples that g_φ sees. The drawing of the path is
    in it; from a pool, its share of what fills the pool.
    """

    transitions: float
    eps: float
    eps_backward: float
    decode: float
    decode_backward: float
    flow: float = 0.0
    flow_backward: float = 0.0


def work_of(config: Config) -> Work:
    """Counted in a world, where an update takes no time: counts do not depend on the model."""
    paths = 8
    world = worlds.load("gaussian")
    asked, config = config, config.model_copy(deep=True)
    config.sampling.batch_size = config.training.batch_size = paths
    config.sampling.num_batches_per_epoch = config.training.gradient_accumulation_steps = 1
    config.model.guess_decoder = ""
    if source_of(config) == "pool":
        config.pool = config.pool.model_copy(update={"size": paths, "images_per_prompt": paths})
    counts = Counts()
    policy = counted(WorldPolicy(world), counts)
    table, prompts = build_kernel(config, policy), PromptSet(world.prompts)
    reward = NamedReward("gaussian", WorldReward(world))
    parts = MethodParts(config, policy, reward, prompts, table)
    objective = build_objective(parts)
    with tempfile.TemporaryDirectory() as folder:
        collector = collector_of(parts, objective, Shelf(Path(folder), 0))
        drawn = replace(collector.collect(0), reward=torch.zeros(paths))
    filling = Filling.of(asked) if source_of(config) == "pool" else None
    if filling:
        counts.take()
    objective.observe(drawn.condition.prompts, torch.zeros(paths))
    (chosen,) = collector.batches(drawn, 0, 0, objective)
    flow = _Seen(objective.modules)
    batch = chosen.transitions(objective.prepare(chosen))
    objective.losses(batch).total().sum().backward()
    c = counts
    back = filling.backward if filling and objective.carries_gradient else 0.0
    carried = asked.sampling.num_steps * back  # along each path of the pool, once, but its start
    share = filling or Filling(evaluations=0.0, decodes=1.0, backward=0.0)  # the reward, once
    return Work(
        len(batch) / paths,
        (c.model - c.model_backward) / paths + share.evaluations + carried,
        c.model_backward / paths + carried - back,
        c.decode / paths + share.decodes,
        c.decode_backward / paths + back,
        flow.forward / paths,
        flow.backward / paths,
    )


@dataclass(frozen=True)
class Filling:
    """What filling a pool costs for each path that an update takes of it."""

    evaluations: float
    decodes: float
    backward: float  # from the reward

    @staticmethod
    def of(config: Config) -> Filling:
        t, s, steps = config.training, config.pool, config.sampling.num_steps
        taken = t.batch_size * t.gradient_accumulation_steps * config.updates_per_epoch()
        used = taken * t.num_epochs * t.num_inner_epochs
        own = (t.num_epochs - 1) // s.refresh * s.size * s.own_share
        drawn = (s.size + own) / used
        return Filling(steps * (s.size + 2 * own) / used, drawn * (1 + s.looks), drawn)


class _Seen:
    """Samples that went through the flow network since it was made."""

    def __init__(self, modules: nn.ModuleDict) -> None:
        self.forward = self.backward = 0
        for module in modules.children():
            module.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        self.forward += len(out)
        self.backward += len(out) * out.requires_grad


class Price(Protocol):
    """What one sample costs in a part, in FLOPs or in seconds."""

    @property
    def forward(self) -> float: ...

    @property
    def backward(self) -> float: ...


@dataclass(frozen=True)
class Passes:
    """How many samples go through a part, and how many gradients come back."""

    forward: float
    backward: float = 0.0

    def cost(self, price: Price) -> float:
        return self.forward * price.forward + self.backward * price.backward


def update_passes(config: Config, work: Work) -> dict[str, Passes]:
    """Count the passes of one update and process by part, its share of the drawing included."""
    t = config.training
    paths = t.batch_size * t.gradient_accumulation_steps
    steps = config.sampling.num_steps
    share = Filling.of(config).evaluations if source_of(config) == "pool" else steps
    drawing = share if source_of(config) == "pool" else steps / t.num_inner_epochs
    decoded = Passes(paths * work.decode, paths * work.decode_backward)
    return {
        "drawing": Passes(paths * drawing),
        "U-Net": Passes(paths * (work.eps - share), paths * work.eps_backward),
        "decoder": decoded,
        "reward": decoded,
        "flow network": Passes(paths * work.flow, paths * work.flow_backward),
    }


def measuring_passes(config: Config) -> dict[str, Passes]:
    """Count the passes of what a run measures: before, after, and its fixed-seed samples.

    A sample of the finetuned model is followed by the frozen model along its path (path KL). With
    several processes they share the samples.
    """
    wanted, log, epochs = config.evaluation, config.logging, config.training.num_epochs
    often = [freq for freq in (log.sample_freq, log.eval_freq) if freq]
    probes = sum(n == epochs or any(n % f == 0 for f in often) for n in range(1, epochs + 1))
    fixed = max(1, log.num_samples // log.samples_per_prompt) * log.samples_per_prompt
    looked = wanted.num_prompts * wanted.images_per_prompt
    frozen, tuned = looked + fixed * bool(often), looked + fixed * probes * bool(often)
    pictures = Passes(frozen + tuned)
    return {
        "drawing": Passes(config.sampling.num_steps * (frozen + 2 * tuned)),
        "decoder": pictures,
        "reward": pictures,
    }


def total(passes: Mapping[str, Passes], prices: Mapping[str, Price]) -> float:
    """Add up what all passes cost."""
    return sum(count.cost(prices[part]) for part, count in passes.items())
