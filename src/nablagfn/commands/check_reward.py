"""`nablagfn check-reward NAME`: the table of `rewards.check`, with samples of the base model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import Config, ConfigError, find_file
from ..core.log_reward import LogReward
from ..core.types import Metadata, Policy
from ..evaluation import decoded, draw_paths
from ..families import find_family
from ..methods.build import build_kernel
from ..prompts import BUILT_IN, PromptSet, load_prompts
from ..rewards import NamedReward
from ..rewards.check import LEAST, RewardCheck, check_reward
from ..runtime.distributed import process_state
from .assemble import build_policy, build_reward

WITHOUT_SAMPLES = 4  # prompts that noise alone is scored with


def check(config: Config, samples: int) -> RewardCheck:
    """Check `experiment.reward_fn` on noise and on `samples` pictures of `pretrained.model`.

    Raises ConfigError when the reward, its weights, the prompts or the model are missing.
    """
    device = process_state().device
    if samples == 1:
        raise ConfigError("--samples: give at least 2, or 0 for none")
    prompts: tuple[str, ...] = ()
    metadata: list[Metadata] = []
    if samples or may_have_metadata(config):
        known = load_prompts(config.experiment.prompt_fn)
        prompts = several_each(known, samples) if samples else known.spread(WITHOUT_SAMPLES)
        metadata = known.metadata(prompts)
    reward = build_reward(config, device)
    if not samples:
        return check_reward(reward, prompts=prompts, metadata=metadata, device=device)
    policy = build_policy(config, device)
    table = build_kernel(config, policy)
    with policy.reference():
        paths = draw_paths(policy, table, prompts, range(samples), seed=config.evaluation.seed)
    latents = paths.clean
    pictures = decoded(policy, latents)
    return check_reward(
        reward,
        pictures,
        prompts,
        metadata=metadata,
        latent_gradient=latent_gradient(policy, reward, latents, prompts, metadata),
    )


def several_each(known: PromptSet, samples: int) -> tuple[str, ...]:
    """The prompt of each sample: LEAST of each prompt, so that they tell how rewards spread."""
    chosen = known.spread(max(1, samples // LEAST))
    return tuple(sorted((chosen * samples)[:samples], key=chosen.index))


def may_have_metadata(config: Config) -> bool:
    """Whether the prompts are a file; named sets, and worlds, have prompts only."""
    name = config.experiment.prompt_fn
    given = name not in BUILT_IN and find_file(name) is not None
    return given and find_family(config).own is None


def latent_gradient(
    policy: Policy,
    reward: NamedReward,
    latents: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
) -> Tensor | None:
    """∇_x r(decode(x)) at clean latents, one by one, [B, ...]; None when the reward has none."""
    if not reward.differentiable:
        return None
    log_reward = LogReward(policy, reward, 1.0)
    found = []
    for latent, prompt, about in zip(latents, prompts, metadata, strict=True):
        x = latent[None].detach().requires_grad_()
        try:
            value = log_reward(x, policy.condition([prompt], [about]))
        except ConfigError:  # the table says why
            return None
        found.append(torch.autograd.grad(value.sum(), x, allow_unused=True)[0])
    return None if any(g is None for g in found) else torch.cat(found)
