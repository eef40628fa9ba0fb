"""Where the parts meet: from a config to a policy, a reward, prompts and a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from . import pictures, rewards
from .checkpoint import load_policy
from .config import Config, ConfigError
from .distributed import from_main_process, process_state, weight_dtype
from .evaluation import draw
from .methods import build_kernel
from .models.locate import locate
from .models.stable_diffusion import StableDiffusionPolicy
from .prompts import PromptSet, load_prompts
from .runfolder import RunFolder, complete_checkpoints
from .runlog import make_accelerator
from .trainer import Trainer


def build_policy(config: Config, device: torch.device) -> StableDiffusionPolicy:
    """The pretrained model with its LoRA, on `device`. Raises ConfigError when it is missing."""
    return StableDiffusionPolicy.from_pretrained(
        config.pretrained.model,
        revision=config.pretrained.revision,
        dtype=weight_dtype(config, device),
        device=device,
        guidance_scale=config.sampling.guidance_scale,
        lora_rank=config.model.lora_rank,
        seed=config.seed,
        gradient_checkpointing=config.training.gradient_checkpointing,
    )


def build_reward(config: Config, device: torch.device) -> rewards.NamedReward:
    """The reward on `device`. Raises ConfigError when it or its weights are missing."""
    return rewards.resolve(
        config.experiment.reward_fn, device, config.reward.weights, config.reward
    )


def build_trainer(config: Config, folder: RunFolder) -> Trainer:
    """Check and load everything in the order of cost: names first, weights last."""
    locate(config.pretrained.model, config.pretrained.revision)
    prompts = load_prompts(config.experiment.prompt_fn)
    folder = from_main_process(folder)  # a late process must not see the run as already there
    accelerator = make_accelerator(config, folder)
    reward = build_reward(config, accelerator.device)
    return Trainer(
        build_policy(config, accelerator.device),
        reward,
        prompts,
        config,
        folder=folder,
        accelerator=accelerator,
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
    found = {path.name: path for path in complete_checkpoints(folder.checkpoints)}
    if not found or (checkpoint and checkpoint not in found):
        raise ConfigError(
            f"{folder.path} has no checkpoint {checkpoint or 'yet'}; there is: "
            + (", ".join(found) or "none")
        )
    name = checkpoint or max(found)
    policy = build_policy(config, process_state().device)
    load_policy(policy, found[name])
    table = build_kernel(config, policy)
    wanted = list(prompts) or list(PromptSet(tuple(folder.read_json("prompts.json"))).spread(4))
    rows = []
    for prompt in wanted:
        repeated = [prompt] * len(seeds)
        with policy.reference():
            rows.append(draw(policy, table, repeated, seeds, seed=0))
        rows.append(draw(policy, table, repeated, seeds, seed=0))
    target = out or folder.path / "samples" / f"{name}.png"
    pictures.save_grid(torch.cat(rows), target, columns=len(seeds))
    return target
