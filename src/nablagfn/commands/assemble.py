"""Where the parts meet: from a config to a policy, a reward, prompts and a trainer."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from .. import rewards
from ..config import Config, ConfigError
from ..core.types import Metadata, Policy, Recogniser, Reward, View
from ..evaluation import Evaluator, PictureView, draw
from ..evaluation.extractors import Extractor, embedded, load_extractor
from ..evaluation.resampling import Correction
from ..families import check_belongs, claimed, find_family
from ..methods.build import build_kernel
from ..methods.registry import target_of
from ..models.locate import critics_of
from ..models.shard import check_several
from ..models.tune import check_speed, compile_modules
from ..prompts import PromptSet, load_prompts
from ..rewards import NamedReward
from ..rewards.critics import AnimalClassifier
from ..runs.hub import sha256_of
from ..runs.runfolder import RunFolder
from ..runtime.distributed import from_main_process, process_state, set_backend_flags
from ..training.checkpoint import guard_factor, load_policy
from ..training.runlog import make_accelerator
from ..training.trainer import Callback, Trainer


def check_names(config: Config) -> None:
    """What can be known before anything is loaded. Raises ConfigError, one line."""
    model, family = config.pretrained.model, find_family(config)
    named = {
        "config.experiment.reward_fn": config.experiment.reward_fn,
        "config.experiment.prompt_fn": config.experiment.prompt_fn,
    }
    for key, value in named.items():
        alone = claimed(value)
        if value != model and (family.own or (alone and alone.own)):
            raise ConfigError(
                f"{key}={value!r} does not go with config.pretrained.model={model!r}: a world has "
                "its own reward and prompts (--config=worlds/NAME sets all three)"
            )
    for name in config.evaluation.held_out_rewards:
        try:
            if family.own:
                raise ConfigError("a world has its own reward and no other")
            rewards.check_names(name)
        except ConfigError as error:
            raise ConfigError(f"config.evaluation.held_out_rewards={name!r}: {error}") from None
    varies = config.model.lora_variation
    if varies and not family.lora_targets:
        raise ConfigError(
            f"{varies} does not go with {model}, whose family ({family.name}) names no "
            "lora_targets, so that nothing says that it has a LoRA: set it back"
        )
    family.check(config)
    check_belongs(config, family)


def build_prompts(config: Config) -> PromptSet:
    """The prompts of the world, or those of `experiment.prompt_fn`."""
    own = find_family(config).own
    return own.prompts(config) if own else load_prompts(config.experiment.prompt_fn)


def build_reward(config: Config, device: torch.device) -> NamedReward:
    """The reward of the world, or that of `experiment.reward_fn`."""
    own = find_family(config).own
    if own:
        return own.reward(config)
    name = config.experiment.reward_fn
    found = rewards.resolve(name, _home(config, device), config.reward.weights, config.reward)
    if config.speed.compile_reward:
        compile_modules(rewards.networks_of(found))
        found = replace(found, made_with={**found.made_with, "speed.compile_reward": True})
    return rewards.offloaded(found) if config.speed.offload_reward else found


def build_held_out(config: Config, device: torch.device) -> dict[str, NamedReward]:
    """The rewards of `evaluation.held_out_rewards`, by name."""
    names = config.evaluation.held_out_rewards
    found = rewards.resolve_all(names, _home(config, device), config.reward.weights)
    if not config.speed.offload_reward:
        return found
    return {name: rewards.offloaded(reward) for name, reward in found.items()}


def _home(config: Config, device: torch.device) -> torch.device:
    """Return the device that rewards are loaded to."""
    return torch.device("cpu") if config.speed.offload_reward else device


def build_extractor(config: Config, device: torch.device) -> Extractor:
    """Load the extractor of picture features; a world needs none and loads none."""
    if find_family(config).own:
        return embedded
    return load_extractor(config.evaluation.extractor, device, config.reward.weights)


def build_recogniser(config: Config, device: torch.device) -> Recogniser | None:
    """The classifier that came with the pretrained model, if it has one."""
    folder = critics_of(config.pretrained.model)
    return None if folder is None else AnimalClassifier.from_folder(folder).to(device).eval()


def build_view(config: Config, extractor: Extractor = embedded) -> View:
    """Points of a world beside its target, or pictures and their features by `extractor`."""
    family = find_family(config)
    if family.own is None:
        return PictureView(extractor)
    policy = family.load(config, torch.device("cpu"), False)
    return family.own.view(config, build_kernel(config, policy))


def build_policy(config: Config, device: torch.device, *, shard: bool = False) -> Policy:
    """The pretrained model with its adapter, on `device`. Raises ConfigError when it is missing.

    shard: spread over the processes, which then have to make each pass together.
    """
    return find_family(config).load(config, device, shard)


def build_trainer(
    config: Config,
    folder: RunFolder,
    *,
    reward: Reward | None = None,
    prompts: PromptSet | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trainer:
    """Check and load everything in the order of cost: names first, weights last.

    reward, prompts: instead of those that the config names.
    """
    check_names(config)
    if config.training.shard_base:
        check_several(process_state().num_processes)
    prompts = prompts or build_prompts(config)
    folder = from_main_process(folder)  # a late process must not see the run as already there
    accelerator = make_accelerator(config, folder)
    device = accelerator.device
    check_speed(config.speed, device)
    reward = build_reward(config, device) if reward is None else reward
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
        recogniser=build_recogniser(config, device),
        callbacks=callbacks,
    )


def build_evaluator(
    config: Config,
    accelerator: Accelerator,
    *,
    about: Mapping[str, Metadata],
    held_out: Sequence[str] = (),
) -> Evaluator:
    """Load in the order of cost: rewards and extractor first, the model last.

    about: the metadata of prompts that have some. held_out: names of rewards to measure as well.
    """
    device = accelerator.device
    set_backend_flags(config)
    reward = build_reward(config, device)
    others = rewards.resolve_all(tuple(held_out), device, config.reward.weights)
    view = build_view(config, build_extractor(config, device))
    several = accelerator.num_processes > 1
    policy = build_policy(config, device, shard=config.training.shard_base and several)
    return Evaluator(
        accelerator,
        policy,
        reward,
        build_kernel(config, policy),
        batch_size=config.evaluation.batch_size or config.sampling.batch_size,
        seed=config.evaluation.seed,
        view=view,
        recogniser=build_recogniser(config, device),
        held_out=others,
        about=about,
    )


def some_prompts(known: PromptSet, count: int) -> tuple[str, ...]:
    """So many different prompts of the set, evenly spread; 0: all. Raises ConfigError."""
    if count < 0:
        raise ConfigError(f"--num-prompts {count}: give 1 or more, or 0 for all")
    different = PromptSet(tuple(dict.fromkeys(known.prompts)))
    return different.spread(count) if 0 < count < len(different) else different.prompts


def beta_to_resample(config: Config, paths: int, factor: float = 1.0) -> float:
    """β after the guard's factor. Raises ConfigError for a run without a target, or K < 2."""
    if paths < 2:
        raise ConfigError(f"--resample {paths}: give 2 or more paths for each sample, or 0")
    aim = target_of(config, factor)
    if aim.beta is None:
        raise ConfigError(f"--resample needs a target: {aim.why}")
    return aim.beta


def side_by_side(
    folder: RunFolder,
    *,
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2, 3),
    checkpoint: str = "",
    out: Path | None = None,
    resample: int = 0,
) -> Path:
    """A picture: per prompt one row of the base model and one of the finetuned, same seeds.

    resample: so many paths for each finetuned sample, of which the target's are kept. Raises
    ConfigError when the run has no (such) checkpoint, or for resampling without a target.
    """
    config = folder.config()
    chosen = folder.checkpoint(checkpoint)
    beta = beta_to_resample(config, resample, guard_factor(chosen)) if resample else 0.0
    policy = build_policy(config, process_state().device)
    load_policy(policy, chosen)
    table = build_kernel(config, policy)
    correction = None
    if resample:
        correction = Correction(
            policy,
            table,
            build_reward(config, process_state().device),
            beta=beta,
            paths=resample,
            about=folder.about(),
            batch=config.evaluation.batch_size or config.sampling.batch_size,
            seed=0,
        )
    wanted = list(prompts) or list(PromptSet(tuple(folder.read_json("prompts.json"))).spread(4))
    rows = []
    for prompt in wanted:
        repeated = [prompt] * len(seeds)
        with policy.reference():
            rows.append(draw(policy, table, repeated, seeds, seed=0))
        if correction is None:
            rows.append(draw(policy, table, repeated, seeds, seed=0))
        else:
            rows.append(correction.draw(prompt, seeds))
    name = f"{chosen.name}_resampled{resample}" if resample else chosen.name
    target = out or folder.path / "samples" / f"{name}.png"
    asked = [prompt for prompt in wanted for _ in range(2 * len(seeds))]
    build_view(config).save(torch.cat([row.cpu() for row in rows]), asked, target, len(seeds))
    return target


def sources_of(reward: str) -> dict[str, str]:
    """SHA-256 of the file of each module that a reward's name refers to, or several names."""
    found = {}
    for module in re.findall(r"([\w.]+):\w", reward):
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            continue  # it will be told of when it is loaded
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            found[module] = sha256_of(Path(spec.origin))
    return found
