"""The forward-looking guess: the reward gradient at the predicted clean sample (layer 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import kernels
from .types import Condition, Policy, Reward

Attenuation = Literal["squared", "sqrt"]


def attenuation(alpha_bar: Tensor, mode: Attenuation) -> Tensor:
    """γ_k: how far the guess is trusted at noise level ᾱ_k: 'squared' ᾱ_k, 'sqrt' √ᾱ_k."""
    return alpha_bar if mode == "squared" else alpha_bar.sqrt()


@dataclass(frozen=True)
class LogReward:
    """log R(x_N) = β·r(decode(x_N), own prompts): float32 whatever the policy computes in."""

    policy: Policy
    reward: Reward
    scale: float

    def __call__(self, x_clean: Tensor, condition: Condition) -> Tensor:
        """x_clean [M, ...] -> [M]. Pixels are not clamped: a clamp has no gradient outside."""
        images = self.policy.decode(x_clean)
        images = images if images.dtype == torch.float64 else images.float()
        return self.scale * self.reward(images, condition.prompts, condition.metadata)


def predicted_clean(
    policy: Policy, x: Tensor, timestep: Tensor, alpha_bar: Tensor, clean: Tensor, where: Condition
) -> Tensor:
    """x̂_θ(x) [M, ...]; rows marked `clean` ([M] booleans) are clean already and are kept."""
    if bool(clean.all()):
        return x
    if not bool(clean.any()):
        return kernels.predict_clean(x, policy.eps(x, timestep, where), alpha_bar)
    noisy = ~clean
    eps = policy.eps(x[noisy], timestep[noisy], where[noisy])
    predicted = kernels.predict_clean(x[noisy], eps, alpha_bar[noisy])
    return x.index_put((noisy.nonzero()[:, 0],), predicted)


def guess(
    log_reward: Callable[[Tensor, Condition], Tensor],
    policy: Policy,
    x_next: Tensor,
    k: kernels.Step,
    condition: Condition,
    mode: Attenuation,
) -> Tensor:
    """β·γ·∇_x r(decode(x̂_θ(x))) at x = x_{k+1}, detached, [M, ...] (Liu et al. 2025).

    At the clean end x̂ is x itself and γ = 1.
    """
    x = x_next.detach().requires_grad_()
    with torch.enable_grad():
        x_clean = predicted_clean(policy, x, k.timestep_next, k.alpha_bar_next, k.last, condition)
        value = log_reward(x_clean, condition)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    gamma = attenuation(k.alpha_bar_next, mode)
    gamma = torch.where(k.last.reshape(gamma.shape), torch.ones_like(gamma), gamma)
    return gamma * gradient
