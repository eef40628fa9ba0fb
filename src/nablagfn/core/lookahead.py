"""The forward-looking guess: the reward gradient at the predicted clean sample (layer 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from . import kernels
from .surrogate import wants_gradient, with_gradient
from .types import Condition, Policy, Reward, beside

Attenuation = Literal["squared", "sqrt", "none"]


def attenuation(alpha_bar: Tensor, mode: Attenuation) -> Tensor:
    """γ_k: trust in the guess at noise level ᾱ_k: 'squared' is ᾱ_k, 'sqrt' √ᾱ_k, 'none' 1."""
    powers = {"squared": 1.0, "sqrt": 0.5, "none": 0.0}
    return alpha_bar ** powers[mode]


def row_attenuation(alpha_bar: Tensor, mode: Attenuation, like: Tensor) -> Tensor:
    """γ of each row, [M], in the dtype of `like`: what log R(x̂) [M] is weighted by."""
    return attenuation(alpha_bar, mode).flatten().to(like.dtype)


def untempered() -> float:
    """β as it was set."""
    return 1.0


@dataclass(frozen=True)
class LogReward:
    """log R(x_N) = β·r(decode(x_N), own prompts): float32 whatever the policy computes in.

    β is scale times what `temper` says at the moment: the guard may have lowered it.

    piece: pictures at a time, 0 for all. Each piece is differentiated at once and its graph is
    gone before the next: one piece of decoder and reward in memory, and nothing is computed twice.
    decoder: what decodes predicted clean samples, instead of the policy; never x_N itself.
    """

    policy: Policy
    reward: Reward
    scale: float
    temper: Callable[[], float] = untempered
    piece: int = 0
    decoder: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x_clean: Tensor, condition: Condition) -> Tensor:
        """x_clean [M, ...] -> [M]. Pixels are not clamped: a clamp has no gradient outside."""
        if not self.piece:
            return self._value(x_clean, condition)
        rows = torch.arange(len(condition)).split(self.piece)
        pieces = zip(x_clean.split(self.piece), (condition[r] for r in rows), strict=True)
        if not wants_gradient(x_clean):
            return torch.cat([self._value(x, where) for x, where in pieces])
        found = [self._differentiated(x.detach(), where) for x, where in pieces]
        values, gradients = zip(*found, strict=True)
        return with_gradient(x_clean, torch.cat(values), torch.cat(gradients))

    def at_next(self, x_clean: Tensor, k: kernels.Step, condition: Condition) -> Tensor:
        """The same at x̂(x_{k+1}), [M]; rows that are x_N (k last) are decoded by the policy."""
        if self.decoder is None or len(k.noisy) == len(x_clean):
            return self(x_clean, condition)
        exact = replace(self, decoder=None)
        mask = torch.ones(len(x_clean), dtype=torch.bool)
        mask[k.noisy] = False
        parts = []
        for rows, log_reward in ((mask.nonzero()[:, 0], exact), (k.noisy, self)):
            if len(rows):
                value = log_reward(x_clean[beside(rows, x_clean)], condition[rows])
                parts.append((rows, value))
        order = torch.cat([rows for rows, _ in parts]).argsort()
        return torch.cat([value for _, value in parts])[beside(order, x_clean)]

    def _value(self, x_clean: Tensor, condition: Condition) -> Tensor:
        images = (self.decoder or self.policy.decode)(x_clean)
        images = images if images.dtype == torch.float64 else images.float()
        return self.of(self.reward(images, condition.prompts, condition.metadata))

    def of(self, reward: Tensor) -> Tensor:
        """β·r of rewards that were measured, of any shape."""
        return self.temper() * self.scale * reward

    def _differentiated(self, x_clean: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The value [m], and its gradient [m, ...]."""
        x = x_clean.requires_grad_()
        value = self._value(x, condition)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient


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


def terminal_gradient(
    log_reward: Callable[[Tensor, Condition], Tensor], x_clean: Tensor, condition: Condition
) -> Tensor:
    """∇ log F̃(x_N) = β·∇r(decode(x_N)), detached, [B, ...]."""
    x = x_clean.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(log_reward(x, condition).sum(), x)
    return gradient
