"""An independent witness of residual ∇-DB (arXiv 2412.07775), written from the mathematics alone.

It imports nothing of the package and takes another road to the same numbers: one transition at
a time, explicit Gaussian log densities, and automatic differentiation of their difference
log P̃ = log p_θ − s·log p_#. Nothing is cancelled or shared by hand, so it is slow, and trustworthy
in float64 only. What it differentiates, for one transition x_k → x_{k+1}:

    forward    ‖ ∇_{x_{k+1}} log P̃(x_{k+1}|x_k) − ∇ log F̃(x_{k+1}) ‖²
    reverse    ‖ ∇_{x_k}     log P̃(x_{k+1}|x_k) + ∇ log F̃(x_k) ‖²        (score gives θ no gradient)
    terminal   ‖ g_φ(x_N) ‖²                                            (last transition only)
    trust      ‖ ε_θ(x_k) − ε_θ†(x_k) ‖²

    ∇ log F̃(x_k) = β γ_k ∇_{x_k} r(x̂_θ(x_k), prompt) + g_φ(x_k)         (first part detached)
    ∇ log F̃(x_N) = β ∇ r(x_N, prompt) + g_φ(x_N)                        (clean: x̂ = x_N, γ = 1)

Norms are means over the elements of a sample, here of any shape [...] and without a batch axis.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

# (sample [...], the network's time there, prompt) → [...]
Field = Callable[[Tensor, int, Any], Tensor]
# (x_k [...], ε(x_k) [...], ᾱ_k, ᾱ_{k+1}) → mean [...] of x_{k+1} and its standard deviation
Kernel = Callable[[Tensor, Tensor, float, float], tuple[Tensor, float]]


@dataclass(frozen=True)
class Transition:
    """One step x_k → x_{k+1}, both [...]; `last` says that x_{k+1} is the clean x_N."""

    x: Tensor
    x_next: Tensor
    time: int
    time_next: int
    alpha_bar: float
    alpha_bar_next: float
    last: bool
    prompt: Any


@dataclass(frozen=True)
class Setting:
    """The models and the numbers of the objective; `flow` None is the variant without g_φ."""

    kernel: Kernel
    eps_theta: Field  # ε_θ, differentiable in θ
    eps_ref: Field  # ε_#
    eps_old: Field  # ε_θ†
    flow: Field | None  # g_φ, differentiable in φ
    reward: Callable[[Tensor, Any], Tensor]  # (clean latent [...], prompt) → scalar
    beta: float = 1.0
    gamma_power: float = 1.0  # γ = ᾱ^power: 1 is 'squared' (√ᾱ squared), 1/2 is √ᾱ
    strength: float = 1.0  # s, on log p_# alone
    reverse_scale: float = 1.0  # w_B
    trust_scale: float = 0.0  # λ


@dataclass(frozen=True)
class Terms:
    """The unweighted terms of one transition (scalars) and what they are made of ([...])."""

    forward: Tensor
    reverse: Tensor
    terminal: Tensor
    trust: Tensor
    forward_score: Tensor
    reverse_score: Tensor


def clean_from(x: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    """x̂ [...]: solves x = √ᾱ·x̂ + √(1−ᾱ)·ε, with x and ε [...]."""
    return (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)


def ddim_kernel(eta: float) -> Kernel:
    """DDIM(η), and DDPM at η = 1: renoise x̂, partly with the predicted ε, partly afresh."""

    def kernel(x: Tensor, eps: Tensor, here: float, there: float) -> tuple[Tensor, float]:
        variance = eta**2 * (1 - there) / (1 - here) * (1 - here / there)
        kept = math.sqrt(1 - there - variance)
        return math.sqrt(there) * clean_from(x, eps, here) + kept * eps, math.sqrt(variance)

    return kernel


def sde_dpm_kernel(x: Tensor, eps: Tensor, here: float, there: float) -> tuple[Tensor, float]:
    """First-order SDE-DPM-Solver++: x [...], eps [...] → mean [...], std; λ = ln(α/σ)."""
    alpha_s, sigma_s = math.sqrt(here), math.sqrt(1 - here)
    alpha_t, sigma_t = math.sqrt(there), math.sqrt(1 - there)
    h = math.log(alpha_t / sigma_t) - math.log(alpha_s / sigma_s)
    fresh = 1 - math.exp(-2 * h)
    mean = sigma_t / sigma_s * math.exp(-h) * x + alpha_t * fresh * clean_from(x, eps, here)
    return mean, sigma_t * math.sqrt(fresh)


def log_residual(setting: Setting, step: Transition, x: Tensor, x_next: Tensor) -> Tensor:
    """Scalar log p_θ(x_{k+1}|x_k) − s·log p_#(x_{k+1}|x_k), differentiable in all it is made of."""
    log_p = []
    for eps in (setting.eps_theta, setting.eps_ref):
        noise = eps(x, step.time, step.prompt)
        mean, std = setting.kernel(x, noise, step.alpha_bar, step.alpha_bar_next)
        log_p.append(Normal(mean, std).log_prob(x_next).sum())
    return log_p[0] - setting.strength * log_p[1]


def forward_score(setting: Setting, step: Transition) -> Tensor:
    """∇_{x_{k+1}} log P̃ [...], a function of θ."""
    x_next = step.x_next.detach().clone().requires_grad_()
    value = log_residual(setting, step, step.x.detach(), x_next)
    return torch.autograd.grad(value, x_next, create_graph=True)[0]


def reverse_score(setting: Setting, step: Transition) -> Tensor:
    """∇_{x_k} log P̃ [...]; a constant: its gradient in θ would need a second derivative of ε."""
    x = step.x.detach().clone().requires_grad_()
    value = log_residual(setting, step, x, step.x_next.detach())
    return torch.autograd.grad(value, x)[0].detach()


def guess_noisy(setting: Setting, x: Tensor, time: int, alpha_bar: float, prompt: Any) -> Tensor:
    """β γ ∇_x r(x̂_θ(x)) [...] at a noisy x [...], through ε_θ; a constant."""
    x = x.detach().clone().requires_grad_()
    clean = clean_from(x, setting.eps_theta(x, time, prompt), alpha_bar)
    slope = torch.autograd.grad(setting.reward(clean, prompt), x)[0].detach()
    return setting.beta * alpha_bar**setting.gamma_power * slope


def guess_clean(setting: Setting, x: Tensor, prompt: Any) -> Tensor:
    """β ∇ r(x_N) [...]; a constant."""
    x = x.detach().clone().requires_grad_()
    return setting.beta * torch.autograd.grad(setting.reward(x, prompt), x)[0].detach()


def guess_next(setting: Setting, step: Transition) -> Tensor:
    """The reward's part of ∇ log F̃(x_{k+1}) [...]."""
    if step.last:
        return guess_clean(setting, step.x_next, step.prompt)
    return guess_noisy(setting, step.x_next, step.time_next, step.alpha_bar_next, step.prompt)


def mean_square(x: Tensor) -> Tensor:
    """[...] → scalar: the mean over the elements."""
    return (x * x).sum() / x.numel()


def terms(setting: Setting, step: Transition) -> Terms:
    """All terms of one transition; without a flow the reverse and terminal terms are 0."""
    zero = torch.zeros((), dtype=step.x.dtype)
    x, x_next = step.x.detach(), step.x_next.detach()
    score, back = forward_score(setting, step), reverse_score(setting, step)
    value_next = guess_next(setting, step)
    reverse = terminal = zero
    if setting.flow is not None:
        here = setting.flow(x, step.time, step.prompt)
        there = setting.flow(x_next, step.time_next, step.prompt)
        value = guess_noisy(setting, x, step.time, step.alpha_bar, step.prompt) + here
        value_next = value_next + there
        reverse = mean_square(back + value)
        terminal = mean_square(there) if step.last else zero
    moved = setting.eps_theta(x, step.time, step.prompt)
    moved = moved - setting.eps_old(x, step.time, step.prompt).detach()
    return Terms(
        forward=mean_square(score - value_next),
        reverse=reverse,
        terminal=terminal,
        trust=mean_square(moved),
        forward_score=score,
        reverse_score=back,
    )


def loss(setting: Setting, one: Terms) -> Tensor:
    """Scalar: the weighted sum of one transition's terms."""
    weighted = setting.reverse_scale * one.reverse + setting.trust_scale * one.trust
    return one.forward + one.terminal + weighted
