"""What the GPU tests share: the random pipeline and tiny-animals on a device, in any dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nablagfn.config import Config
from nablagfn.core.types import Selection
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.models.tune import tune
from nablagfn.prompts import PromptSet
from nablagfn.rewards import analytic
from nablagfn.rewards.offload import offloaded
from nablagfn.rewards.registry import named
from nablagfn.runs.runfolder import RunFolder
from nablagfn.training.trainer import Trainer
from tests.test_rivals import method_config
from tests.tiny_pipeline import make_pipeline

PROMPTS = PromptSet(("a cat", "a duck", "ants"))
PRECISION = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def settings(method: str, out: Path, **options: object) -> Config:
    """Small ones, guided, with float32 products."""
    usual = {
        "model.reward_scale": 100.0,
        "training.mixed_precision": "no",
        "training.allow_tf32": False,
        "sampling.guidance_scale": 3.0,
    }
    return method_config(method, out, **{**usual, **options})


def random_policy(config: Config, device: torch.device) -> StableDiffusionPolicy:
    """The tests' pipeline in the config's dtype, whatever the device; the VAE as in a run."""
    dtype = PRECISION[config.training.mixed_precision]
    pipeline = make_pipeline().to(dtype)
    if dtype == torch.float16:
        pipeline.vae.to(torch.float32)
    policy = StableDiffusionPolicy(
        pipeline.to(device),
        lora_rank=config.model.lora_rank,
        guidance_scale=config.sampling.guidance_scale,
        gradient_checkpointing=config.training.gradient_checkpointing,
        vae_slice=config.training.vae_slice,
    )
    return tune(policy, config.speed)


def trainer_on(
    device: torch.device, method: str, out: Path, *, reward: Any = None, **options: object
) -> Trainer:
    """Of the random pipeline."""
    config = settings(method, out, **options)
    reward = named(reward or analytic.colourfulness)
    return Trainer(
        random_policy(config, device),
        offloaded(reward) if config.speed.offload_reward else reward,
        PROMPTS,
        config,
        folder=RunFolder(out / "run"),
        show_progress=False,
    )


def drawn(trainer: Trainer) -> Selection:
    """The data of the first update, rewards told to the objective."""
    paths = trainer.collector.collect(0)
    paths = replace(paths, reward=trainer._scores(paths).total)
    trainer._observe(paths)
    (chosen,) = trainer.collector.batches(paths, 0, 0, trainer.objective)
    return chosen


def learned(trainer: Trainer) -> dict[str, Tensor]:
    """θ and what the objective learns, on the CPU."""
    parts = {**trainer.policy.state_dict(), **trainer.objective.modules.state_dict()}
    return {name: value.detach().cpu().clone() for name, value in parts.items()}


def relative(found: Tensor, known: Tensor) -> float:
    return float((found - known).norm() / known.norm())


def cosine(found: Tensor, known: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(found.flatten(), known.flatten(), dim=0))


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().float().cpu().flatten() for t in tensors])
