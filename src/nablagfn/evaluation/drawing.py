"""Samples as functions of (seed, index): the same noise for every model that is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..core import rng
from ..core.kernels import KernelTable
from ..core.rollout import rollout
from ..core.types import Policy, Trajectories


def draw(
    policy: Policy, table: KernelTable, prompts: Sequence[str], seeds: Sequence[int], *, seed: int
) -> Tensor:
    """Decoded samples, [B, 3, H, W]; the noise of row i depends on (seed, seeds[i]) only."""
    return decoded(policy, draw_paths(policy, table, prompts, seeds, seed=seed).clean)


def decoded(policy: Policy, latents: Tensor) -> Tensor:
    """Clean samples [B, ...] as they are looked at: pictures clamped to [0, 1], no graph."""
    with torch.no_grad():
        images = policy.decode(latents).float()
    return images.clamp(0, 1) if images.ndim == 4 else images  # points of a world have no range


def draw_paths(
    policy: Policy,
    table: KernelTable,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    seed: int,
    reference: bool = False,
) -> Trajectories:
    """The whole paths of `draw`; reference: the pretrained model's."""
    noise = rng.normal(
        (table.num_steps + 1, *policy.sample_shape), seeds, seed=seed, purpose="evaluation"
    )
    with policy.reference() if reference else nullcontext():
        return rollout(policy, table, noise, policy.condition(prompts, ()))
