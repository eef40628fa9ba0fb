"""The rules by which samplers set their steps: from a schedule to on_x, on_clean and std.

x_{k+1} = on_x·x_k + on_clean·x̂ + std·z. Flow-SDE and CPS are those of Flow-GRPO (Liu et al. 2025,
arXiv 2505.05470, and Wang & Yu 2025, arXiv 2509.05952), for flow models, where α = 1 − σ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedules import Schedule


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Of N steps, [N] float64 each."""

    on_x: Tensor
    on_clean: Tensor
    std: Tensor


# (the schedule, η or a: how much noise a step draws) -> the steps
Rule = Callable[[Schedule, float], Coefficients]


def posterior(schedule: Schedule, eta: float) -> Coefficients:
    """DDIM(η), of which η = 1 is the posterior of the forward process (`kernels`).

    Raises ValueError for η outside 0..1, and where a step with η > 0 would have no noise (its
    density would not exist).
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in 0..1, got {eta}")
    if eta > 0:
        require_noisy_end(schedule, "only eta = 0 can end there")
    alpha, sigma = schedule.alpha[:-1], schedule.sigma[:-1]
    alpha_next, sigma_next = schedule.alpha[1:], schedule.sigma[1:]
    ratio = alpha * sigma_next / (alpha_next * sigma)
    fresh = eta**2 * (1 - ratio) * (1 + ratio)  # share of σ'² that is drawn anew
    on_x = (1 - fresh).clamp(min=0).sqrt() * sigma_next / sigma
    return Coefficients(on_x, alpha_next - alpha * on_x, fresh.sqrt() * sigma_next)


def flow_sde(schedule: Schedule, a: float) -> Coefficients:
    """Flow-GRPO's Euler step: with Δ = σ − σ', v = (x − x̂)/σ and s = a·√(σ/(1 − σ)) its

        mean = x(1 − s²Δ/2σ) − vΔ(1 + s²(1 − σ)/2σ),   std = s√Δ

    (arXiv 2505.05470, eq. 9). At σ = 1, where s is infinite, the authors' code has σ of the second
    step in its denominator (flow_grpo/diffusers_patch/sd3_sde_with_logprob.py), and so has this.
    a = √2 is the memoryless process; below, x_N remembers x_0. Raises ValueError for other paths
    than α = 1 − σ, and for a ≤ 0.
    """
    require_straight(schedule)
    if not a > 0:
        raise ValueError(f"a must be above 0, got {a}")
    sigma = schedule.sigma[:-1]
    step = sigma - schedule.sigma[1:]
    kept = 1 - torch.where(schedule.alpha[:-1] > 0, sigma, schedule.sigma[1:])
    square = a**2 * sigma / kept
    half = square / (2 * sigma)
    on_clean = step / sigma * (1 + half * (1 - sigma))
    return Coefficients(1 - half * step - on_clean, on_clean, (square * step).sqrt())


def cps(schedule: Schedule, a: float) -> Coefficients:
    """Coefficients-preserving sampling: of the noise σ' a share sin(aπ/2) is drawn anew,

        mean = (1 − σ')x̂ + ε̂·√(σ'² − std²),   std = σ' sin(aπ/2),   ε̂ = (x − (1 − σ)x̂)/σ

    (arXiv 2509.05952). It has no limit of many steps: each forgets the same share. Raises
    ValueError for other paths than α = 1 − σ, for a outside 0..1, and at a clean end without noise.
    """
    require_straight(schedule)
    if not 0 < a <= 1:
        raise ValueError(f"a must be in 0..1, got {a}")
    require_noisy_end(schedule, "give it some")
    sigma, sigma_next = schedule.sigma[:-1], schedule.sigma[1:]
    on_x = math.cos(a * math.pi / 2) * sigma_next / sigma
    on_clean = schedule.alpha[1:] - schedule.alpha[:-1] * on_x
    return Coefficients(on_x, on_clean, math.sin(a * math.pi / 2) * sigma_next)


RULES: dict[str, Rule] = {"posterior": posterior, "flow-sde": flow_sde, "cps": cps}


def is_straight(schedule: Schedule) -> bool:
    """Whether the path is a flow model's, α = 1 − σ."""
    return bool(torch.allclose(schedule.alpha + schedule.sigma, torch.ones(()).double()))


def require_straight(schedule: Schedule) -> None:
    """Raises ValueError unless α = 1 − σ."""
    if not is_straight(schedule):
        raise ValueError("it is for flow models, whose path has α = 1 − σ, and this one's has not")


def require_noisy_end(schedule: Schedule, otherwise: str) -> None:
    """Raises ValueError when the last level has no noise."""
    if not bool(schedule.sigma[-1] > 0):
        raise ValueError(
            "the last level has no noise: without any the last step has no density, and "
            f"{otherwise}"
        )
