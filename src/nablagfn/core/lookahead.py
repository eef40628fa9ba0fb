"""The forward-looking guess: the reward gradient at the predicted clean sample.

Three ways from ∇r to a gradient at x, with β·γ·…:

    gradient      J_x̂ᵀ ∇r(x̂(x))                                (Liu et al. 2025)
    shifted       [ E[x_N|x + h·β∇r] − E[x_N|x] ]/h,  h = s²/a      x = a·x_N + s·noise
    no-jacobian   ∇r(x̂(x))                                     (VGG-Flow, Liu et al. 2025b)

Tilting by a linear reward shifts what was observed: for it the shifted one is exact with any prior,
also where that has several modes, which a gradient cannot see. The first is its limit h → 0. It
takes a forward pass for the backward one. Where h is large, and r then not linear, h is held back
so that the shift is no longer than `cap` times the noise s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import kernels
from .log_reward import LogReward, terminal_gradient
from .types import Condition, Policy, beside
from .value_gradient import mean_square

Attenuation = Literal["squared", "sqrt", "none"]
GuessKind = Literal["gradient", "shifted", "no-jacobian"]
LEAST = 1e-12  # where something is divided by what may be 0


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
class How:
    """kind: of the guess. cap: of the shift, in units of the noise s."""

    kind: GuessKind = "gradient"
    cap: float = 1.0


GRADIENT = How()


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
    how: How = GRADIENT,
) -> Guessed:
    """β·γ times the gradient at x = x_{k+1}, by `how`.

    x̂ is the policy's: the pretrained model's inside `policy.reference()`. At the clean end x̂ is x
    itself, the gradient β∇r(x), and γ = 1.
    """
    if how.kind != "gradient":
        return _without_backward(log_reward, policy, x_next, k, condition, mode, how)
    x = x_next.detach().requires_grad_()
    with without_theta(policy), torch.enable_grad():
        x_clean = predicted_clean(policy, x, k, condition)
        value = log_reward.at_next(x_clean, k, condition)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    gamma = attenuation(k.next.alpha_bar, mode)
    last = k.last.reshape(-1, *([1] * (x.ndim - 1)))
    return Guessed(torch.where(last, gradient, gamma * gradient), x_clean.detach())


def _without_backward(
    log_reward: LogReward,
    policy: Policy,
    x: Tensor,
    k: kernels.Step,
    condition: Condition,
    mode: Attenuation,
    how: How,
) -> Guessed:
    """The kinds that differentiate the reward alone, and not the network."""
    with torch.no_grad():
        x_clean = predicted_clean(policy, x, k, condition)
    leaf = x_clean.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(log_reward.at_next(leaf, k, condition).sum(), leaf)
    found = of_slope(
        slope,
        k.next,
        mode,
        how,
        lambda shift: predicted_clean(policy, x + shift, k, condition) - x_clean,
    )
    last = k.last.reshape(-1, *([1] * (x.ndim - 1)))
    return Guessed(torch.where(last, slope, found), x_clean)


def guess_here(
    log_reward: LogReward,
    policy: Policy,
    x: Tensor,
    x_clean: Tensor,
    k: kernels.Step,
    condition: Condition,
    mode: Attenuation,
    how: How,
) -> Tensor:
    """The guess at x = x_k, [M, ...], by a kind that needs no backward pass; detached.

    x_clean: x̂(x), known already. The shift, if any, is seen by the policy as it is: the pretrained
    model inside `policy.reference()`.
    """
    x, x_clean = x.detach(), x_clean.detach()

    def change(shift: Tensor) -> Tensor:
        output = policy.output(x + shift, k.here.time, condition)
        return kernels.predict_clean(x + shift, output, k.here) - x_clean

    slope = terminal_gradient(log_reward, x_clean, condition)
    return of_slope(slope, k.here, mode, how, change)


def of_slope(
    slope: Tensor,
    level: kernels.Level,
    mode: Attenuation,
    how: How,
    change: Callable[[Tensor], Tensor],
) -> Tensor:
    """γ times the guess of a kind that needs no backward pass, [M, ...], from slope = β∇r(x̂).

    change: x̂(x + shift) − x̂(x), for the shifted one.
    """
    found = shifted(slope, level, how.cap, change) if how.kind == "shifted" else slope
    return attenuation(level.alpha_bar, mode) * found


def shifted(
    slope: Tensor, level: kernels.Level, cap: float, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """[ E[x_N|x + h·slope] − E[x_N|x] ]/h, [M, ...], without a graph.

    slope: [M, ...] β∇r. change: x̂(x + shift) − x̂(x) of a shift [M, ...].
    """
    size = shift_size(slope, level, cap)
    with torch.no_grad():
        moved = level.end_x * size * slope + level.end_clean * change(size * slope)
    return moved / size.clamp(min=LEAST)


def shift_size(slope: Tensor, level: kernels.Level, cap: float) -> Tensor:
    """h = s²/a, or what makes h·slope as long as cap·s (root mean square), [M, 1, ...].

    slope: [M, ...] β∇r. Finite at a = 0 and at s = 0.
    """
    a, s = level.end_scale, level.end_std
    length = mean_square(slope).sqrt().reshape(-1, *([1] * (slope.ndim - 1)))
    return torch.minimum(s.square() / a.clamp(min=LEAST), cap * s / length.clamp(min=LEAST))
