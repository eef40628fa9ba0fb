"""The forward-looking guess: the reward gradient at the predicted clean sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import kernels
from .log_reward import LogReward
from .types import Condition, Policy, beside

Attenuation = Literal["squared", "sqrt", "none"]


def attenuation(alpha_bar: Tensor, mode: Attenuation) -> Tensor:
    """γ_k: trust in the guess at noise level ᾱ_k: 'squared' is ᾱ_k, 'sqrt' √ᾱ_k, 'none' 1."""
    powers = {"squared": 1.0, "sqrt": 0.5, "none": 0.0}
    return alpha_bar ** powers[mode]


def row_attenuation(alpha_bar: Tensor, mode: Attenuation, like: Tensor) -> Tensor:
    """γ of each row, [M], in the dtype of `like`: what log R(x̂) [M] is weighted by."""
    return attenuation(alpha_bar, mode).flatten().to(like.dtype)


def predicted_clean(policy: Policy, x: Tensor, k: kernels.Step, where: Condition) -> Tensor:
    """x̂_θ(x) [M, ...] at x = x_{k+1}; samples that are clean already (k last) are kept."""
    if len(k.noisy) == 0:
        return _kept_together(policy, x, k, where) if policy.together else x
    if len(k.noisy) == len(x):
        return kernels.predict_clean(x, policy.output(x, k.next.time, where), k.next)
    rows = beside(k.noisy, x)
    output = policy.output(x[rows], k.next.time[rows], where[k.noisy])
    predicted = kernels.predict_clean(x[rows], output, k.next[rows])
    return x.index_put((rows,), predicted)


def _kept_together(policy: Policy, x: Tensor, k: kernels.Step, where: Condition) -> Tensor:
    """x [M, ...], with the pass that the other processes make, forward and backward: one row of
    it, of weight zero."""
    row = torch.zeros(1, dtype=torch.long)
    here = beside(row, x)
    output = policy.output(x[here], k.next.time[here], where[row])
    return torch.where(torch.zeros_like(x, dtype=torch.bool), output, x)


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
    log_reward: LogReward,
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
        value = log_reward.at_next(x_clean, k, condition)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    gamma = attenuation(k.next.alpha_bar, mode)
    last = k.last.reshape(-1, *([1] * (x.ndim - 1)))
    return Guessed(torch.where(last, gradient, gamma * gradient), x_clean.detach())
