"""Worlds: exact models with a reward and prompts of their own (docs/worlds.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import worlds
from ..config import Config, ConfigError
from .family import Family, Own

if TYPE_CHECKING:
    import torch

    from ..core.kernels import KernelTable
    from ..core.types import Policy, View
    from ..prompts import PromptSet
    from ..rewards import NamedReward


def check(config: Config) -> None:
    """Raises ConfigError when there is no such world, for shards of it, and for sizes."""
    worlds.load(config.pretrained.model)
    for key in ("height", "width", "max_sequence_length"):
        value = getattr(config.sampling, key)
        if value:
            raise ConfigError(
                f"config.sampling.{key}={value}: {config.pretrained.model} is a world, and has a "
                "size of its own: leave it at 0"
            )
    if config.training.shard_base:
        raise ConfigError(
            f"config.training.shard_base=True does not go with {config.pretrained.model}: a world "
            "is exact and has no weights to shard"
        )


def load(config: Config, device: torch.device, shard: bool) -> Policy:
    from ..worlds.policy import WorldPolicy

    return WorldPolicy(worlds.load(config.pretrained.model), seed=config.seed).to(device)


def reward(config: Config) -> NamedReward:
    from ..rewards import NamedReward
    from ..worlds.policy import WorldReward

    name = config.experiment.reward_fn
    return NamedReward(name, WorldReward(worlds.load(name)))


def prompts(config: Config) -> PromptSet:
    from ..prompts import PromptSet

    return PromptSet(worlds.load(config.experiment.prompt_fn).prompts)


def check_prompts(config: Config, asked: Sequence[str]) -> None:
    worlds.load(config.pretrained.model).rows(asked)


def view(config: Config, table: KernelTable) -> View:
    from ..worlds.view import WorldView

    return WorldView(worlds.load(config.pretrained.model), table)


WORLD = Family(
    "world",
    claims=worlds.is_world,
    load=load,
    check=check,
    no_export="there is no LoRA to export; its adapter is checkpoints/…/adapter.safetensors",
    small=lambda model: True,
    own=Own(reward, prompts, check_prompts, view),
)
