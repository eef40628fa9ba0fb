"""Where the parts meet: from a config to a policy, a reward, prompts and a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .. import rewards, worlds
from ..config import Config, ConfigError
from ..core.types import Policy, View
from ..evaluation import PictureView, draw
from ..evaluation.extractors import Extractor, embedded, load_extractor
from ..methods.build import build_kernel
from ..models.locate import locate
from ..models.shard import check_several
from ..models.stable_diffusion import StableDiffusionPolicy
from ..models.tune import check_speed, compile_modules, tune
from ..prompts import PromptSet, load_prompts
from ..rewards import NamedReward
from ..runs.runfolder import RunFolder
from ..runtime.distributed import from_main_process, process_state, weight_dtype
from ..training.checkpoint import load_policy
from ..training.runlog import make_accelerator
from ..training.trainer import Trainer
from ..worlds.policy import WorldPolicy, WorldReward
from ..worlds.view import WorldView


def check_names(config: Config) -> None:
    """What can be known before anything is loaded. Raises ConfigError, one line."""
    model = config.pretrained.model
    named = {
        "config.experiment.reward_fn": config.experiment.reward_fn,
        "config.experiment.prompt_fn": config.experiment.prompt_fn,
    }
    for key, value in named.items():
        if value != model and worlds.is_world(model if worlds.is_world(model) else value):
            raise ConfigError(
                f"{key}={value!r} does not go with config.pretrained.model={model!r}: a world has "
                "its own reward and prompts (--config=worlds/NAME sets all three)"
            )
    for name in config.evaluation.held_out_rewards:
        try:
            if worlds.is_world(model):
                raise ConfigError("a world has its own reward and no other")
            rewards.check_names(name)
        except ConfigError as error:
            raise ConfigError(f"config.evaluation.held_out_rewards={name!r}: {error}") from None
    if worlds.is_world(model):
        worlds.load(model)
        if config.training.shard_base:
            raise ConfigError(
                f"config.training.shard_base=True does not go with {model}: a world is exact and "
                "has no weights to shard"
            )
    else:
        locate(model, config.pretrained.revision)


def build_prompts(config: Config) -> PromptSet:
    """The prompts of the world, or those of `experiment.prompt_fn`."""
    name = config.experiment.prompt_fn
    return PromptSet(worlds.load(name).prompts) if worlds.is_world(name) else load_prompts(name)


def build_reward(config: Config, device: torch.device) -> NamedReward:
    """The reward of the world, or that of `experiment.reward_fn`."""
    name = config.experiment.reward_fn
    if worlds.is_world(name):
        return NamedReward(name, WorldReward(worlds.load(name)))
    found = rewards.resolve(name, _home(config, device), config.reward.weights, config.reward)
    if config.speed.compile_reward:
        compile_modules(rewards.networks_of(found))
    return rewards.offloaded(found) if config.speed.offload_reward else found


def build_held_out(config: Config, device: torch.device) -> dict[str, NamedReward]:
    """The rewards of `evaluation.held_out_rewards`, by name."""
    names = config.evaluation.held_out_rewards
    found = rewards.resolve_all(names, _home(config, device), config.reward.weights)
    if not config.speed.offload_reward:
        return found
    return {name: rewards.offloaded(reward) for name, reward in found.items()}


def _home(config: Config, device: torch.device) -> torch.device:
    """Where rewards are loaded to."""
    return torch.device("cpu") if config.speed.offload_reward else device


def build_extractor(config: Config, device: torch.device) -> Extractor:
    """Of picture features, by `evaluation.extractor`; a world needs none and loads none."""
    if worlds.is_world(config.pretrained.model):
        return embedded
    return load_extractor(config.evaluation.extractor, device, config.reward.weights)


def build_view(config: Config, extractor: Extractor = embedded) -> View:
    """Points of a world beside its target, or pictures and their features by `extractor`."""
    name = config.pretrained.model
    if not worlds.is_world(name):
        return PictureView(extractor)
    policy = WorldPolicy(worlds.load(name))
    return WorldView(policy.world, build_kernel(config, policy))


def build_policy(config: Config, device: torch.device, *, shard: bool = False) -> Policy:
    """The pretrained model with its adapter, on `device`. Raises ConfigError when it is missing.

    shard: spread over the processes, which then have to make each pass together.
    """
    name = config.pretrained.model
    if worlds.is_world(name):
        return WorldPolicy(worlds.load(name), seed=config.seed).to(device)
    policy = StableDiffusionPolicy.from_pretrained(
        config.pretrained.model,
        revision=config.pretrained.revision,
        dtype=weight_dtype(config, device),
        device=device,
        guidance_scale=config.sampling.guidance_scale,
        lora_rank=config.model.lora_rank,
        seed=config.seed,
        gradient_checkpointing=config.training.gradient_checkpointing,
        vae_checkpointing=config.training.vae_checkpointing,
        vae_slice=config.training.vae_slice,
        shard=shard,
    )
    return tune(policy, config.speed)


def build_trainer(config: Config, folder: RunFolder) -> Trainer:
    """Check and load everything in the order of cost: names first, weights last."""
    check_names(config)
    if config.training.shard_base:
        check_several(process_state().num_processes)
    prompts = build_prompts(config)
    folder = from_main_process(folder)  # a late process must not see the run as already there
    accelerator = make_accelerator(config, folder)
    device = accelerator.device
    check_speed(config.speed, device)
    reward = build_reward(config, device)
    held_out = build_held_out(config, device)
    view = build_view(config, build_extractor(config, device))
    return Trainer(
        build_policy(config, device, shard=config.training.shard_base),
        reward,
        prompts,
        config,
        folder=folder,
        accelerator=accelerator,
        view=view,
        held_out=held_out,
    )


def side_by_side(
    folder: RunFolder,
    *,
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2, 3),
    checkpoint: str = "",
    out: Path | None = None,
) -> Path:
    """A picture: per prompt one row of the base model and one of the finetuned, same seeds.

    Raises ConfigError when the run has no (such) checkpoint.
    """
    config = folder.config()
    chosen = folder.checkpoint(checkpoint)
    policy = build_policy(config, process_state().device)
    load_policy(policy, chosen)
    table = build_kernel(config, policy)
    wanted = list(prompts) or list(PromptSet(tuple(folder.read_json("prompts.json"))).spread(4))
    rows = []
    for prompt in wanted:
        repeated = [prompt] * len(seeds)
        with policy.reference():
            rows.append(draw(policy, table, repeated, seeds, seed=0))
        rows.append(draw(policy, table, repeated, seeds, seed=0))
    target = out or folder.path / "samples" / f"{chosen.name}.png"
    asked = [prompt for prompt in wanted for _ in range(2 * len(seeds))]
    build_view(config).save(torch.cat(rows), asked, target, len(seeds))
    return target
