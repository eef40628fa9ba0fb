"""How often an update evaluates and decodes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .. import worlds
from ..collect import Collector
from ..config import Config
from ..counting import Counts, counted
from ..methods import build_kernel, build_objective
from ..prompts import PromptSet
from ..rewards import NamedReward
from ..worlds.policy import WorldPolicy, WorldReward


@dataclass(frozen=True)
class Work:
    """Of one path of an update, guided evaluations and decodes, forward and backward apart.

    transitions: how many are learned from. The drawing of the path is in it.
    """

    transitions: float
    eps: float
    eps_backward: float
    decode: float
    decode_backward: float


def work_of(config: Config) -> Work:
    """Counted in a world, where an update takes no time: counts do not depend on the model."""
    paths = 8
    world = worlds.load("gaussian")
    config = config.model_copy(deep=True)
    config.sampling.batch_size = config.training.batch_size = paths
    config.sampling.num_batches_per_epoch = config.training.gradient_accumulation_steps = 1
    config.model.guess_decoder = ""
    counts = Counts()
    policy = counted(WorldPolicy(world), counts)
    table, prompts = build_kernel(config, policy), PromptSet(world.prompts)
    reward = NamedReward("gaussian", WorldReward(world))
    objective = build_objective(config, policy, reward, prompts, table)
    collector = Collector(policy, table, prompts, config)
    drawn = replace(collector.collect(0), reward=torch.zeros(paths))
    objective.observe(drawn.condition.prompts, torch.zeros(paths))
    (chosen,) = collector.batches(drawn, 0, 0, objective)
    batch = chosen.transitions(objective.prepare(chosen))
    objective.losses(batch).total().sum().backward()
    c = counts
    return Work(
        len(batch) / paths,
        (c.model - c.model_backward) / paths,
        c.model_backward / paths,
        c.decode / paths + 1,  # and its reward, once
        c.decode_backward / paths,
    )
