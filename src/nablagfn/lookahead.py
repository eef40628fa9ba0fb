"""The forward-looking guess: the reward gradient at the predicted clean sample (layer 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import kernels
from .types import Condition, Policy, Reward, beside

Attenuation = Literal["squared", "sqrt", "none"]


def attenuation(alpha_bar: Tensor, mode: Attenuation) -> Tensor:
    """γ_k: trust in the guess at noise level ᾱ_k: 'squared' is ᾱ_k, 'sqrt' √ᾱ_k, 'none' 1."""
    powers = {"squared": 1.0, "sqrt": 0.5, "none": 0.0}
    return alpha_bar ** powers[mode]


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


def predicted_clean(policy: Policy, x: Tensor, k: kernels.Step, where: Condition) -> Tensor:
    """x̂_θ(x) [M, ...] at x = x_{k+1}; samples that are clean already (k last) are kept."""
    if len(k.noisy) == 0:
        return x
    if len(k.noisy) == len(x):
        return kernels.predict_clean(x, policy.eps(x, k.timestep_next, where), k.alpha_bar_next)
    rows = beside(k.noisy, x)
    eps = policy.eps(x[rows], k.timestep_next[rows], where[k.noisy])
    predicted = kernels.predict_clean(x[rows], eps, k.alpha_bar_next[rows])
    return x.index_put((rows,), predicted)


@contextmanager
def without_theta(policy: Policy) -> Iterator[None]:
    """Inside it no graph reaches θ: what is differentiated for x only keeps nothing for θ."""
    parameters = policy.parameters()
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)


@dataclass(frozen=True)
class Guessed:
    """gradient: β·γ·∇r at x; x_clean: the x̂(x) it was taken at. Both detached, [M, ...]."""

    gradient: Tensor
    x_clean: Tensor


def guess(
    log_reward: Callable[[Tensor, Condition], Tensor],
    policy: Policy,
    x_next: Tensor,
    k: kernels.Step,
    condition: Condition,
    mode: Attenuation,
) -> Guessed:
    """β·γ·∇_x r(decode(x̂(x))) at x = x_{k+1} (Liu et al. 2025).

    x̂ is the policy's: the pretrained model's inside `policy.reference()`. At the clean end x̂ is x
    itself and γ = 1.
    """
    x = x_next.detach().requires_grad_()
    with without_theta(policy), torch.enable_grad():
        x_clean = predicted_clean(policy, x, k, condition)
        value = log_reward(x_clean, condition)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    gamma = attenuation(k.alpha_bar_next, mode)
    last = k.last.reshape(-1, *([1] * (x.ndim - 1)))
    return Guessed(torch.where(last, gradient, gamma * gradient), x_clean.detach())


def terminal_gradient(
    log_reward: Callable[[Tensor, Condition], Tensor], x_clean: Tensor, condition: Condition
) -> Tensor:
    """∇ log F̃(x_N) = β·∇r(decode(x_N)), detached, [B, ...]."""
    x = x_clean.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(log_reward(x, condition).sum(), x)
    return gradient
