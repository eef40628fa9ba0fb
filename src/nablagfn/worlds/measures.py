"""Distances between samples of a policy and of its target. Pure functions; no policy, no world.
MMD²: `metrics.prior`.

n rows x [n, d] of the policy, m rows y [m, d] of the target.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROJECTIONS = 128


def sliced_wasserstein(
    x: Tensor, y: Tensor, projections: int, generator: torch.Generator
) -> Tensor:
    """Sliced Wasserstein-2 distance, a scalar ≥ 0 in the unit of x (Bonneel et al. 2015).

    √(mean over random unit directions u of W₂²(uᵀx, uᵀy)); in one dimension W₂² is the mean
    squared difference of the sorted values. Two point masses at distance δ have δ/√d on average.
    x, y: [n, d] of equal size. Raises ValueError for different sizes.
    """
    if len(x) != len(y):
        raise ValueError(f"sliced_wasserstein needs samples of equal size, not {len(x)}, {len(y)}")
    u = directions(x.shape[1], projections, generator).to(x.device)
    return sorted_distance(sorted_along(x, u), sorted_along(y, u))


def directions(dim: int, count: int, generator: torch.Generator) -> Tensor:
    """Random unit vectors, [count, dim] float64."""
    u = torch.randn(dim, count, generator=generator, dtype=torch.float64)
    return (u / u.norm(dim=0)).T


def sorted_along(x: Tensor, u: Tensor) -> Tensor:
    """uᵀx in rising order for every direction: x [n, d], u [P, d] -> [P, n] float64."""
    return (u @ x.double().T).sort(1).values


def sorted_distance(along_x: Tensor, along_y: Tensor) -> Tensor:
    """√(mean over directions of W₂²) from the sorted projections [P, n] of both samples."""
    return (along_x - along_y).square().mean().sqrt()


def mode_masses(modes: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """Share of each mode, [count] float64, sum 1. modes [n] in 0..count-1; weights [n], sum 1."""
    weights = (
        torch.full_like(modes, 1 / len(modes), dtype=torch.float64)
        if (weights is None)
        else weights.double()
    )
    return torch.zeros(count, dtype=torch.float64, device=modes.device).index_add_(
        0, modes, weights
    )


def mode_mass_kl(masses: Tensor, target_masses: Tensor) -> Tensor:
    """KL(sample‖target) = Σ_k q_k log(q_k/p_k) in nats, a scalar ≥ 0; empty modes count 0.

    masses q, target_masses p: [K], sum 1. Infinite where p has no mass but q has. n draws of the
    target itself give about (K − 1)/(2n).
    """
    used = masses > 0
    return (masses[used] * (masses[used] / target_masses[used]).log()).sum()


def gaussian_kl(mean: Tensor, cov: Tensor, target_mean: Tensor, target_cov: Tensor) -> Tensor:
    """KL(N(mean, cov)‖N(target_mean, target_cov)) in nats, a scalar ≥ 0.

    ½[tr(Σ_t⁻¹Σ) + (μ_t − μ)ᵀΣ_t⁻¹(μ_t − μ) − d + log(det Σ_t/det Σ)].
    Means [d], covariances [d, d], positive definite.
    """
    away = target_mean - mean
    trace = torch.linalg.solve(target_cov, cov).diagonal().sum()
    square = away @ torch.linalg.solve(target_cov, away)
    log_det = torch.logdet(target_cov) - torch.logdet(cov)
    return (trace + square - len(mean) + log_det) / 2
