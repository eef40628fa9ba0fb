"""Bellman's equation for value gradients: one step back through the frozen model (layer 3).

    ∇ log F̃(x_k) = J_{m_#}(x_k)ᵀ E[∇ log F̃(x_{k+1})]

derived in docs/nabla_db_lambda.md. The λ-return along a drawn path mixes an estimate V(x) with it:

    G_N = β∇r(x_N),   G_k = J_{m_#}(x_k)ᵀ v_{k+1},   v_k = (1−λ)·V(x_k) + λ·G_k,   v_N = G_N

λ = 0 bootstraps after one step; λ = 1 needs no V and is the lean adjoint of Adjoint Matching
(Domingo-Enrich et al. 2025). The return may also end early, after a window, on V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels
from .kernels import KernelTable, Step
from .types import Condition, Policy, Selection

Value = Callable[[Tensor, Step, Condition], Tensor]


def pull_back(policy: Policy, x: Tensor, k: Step, condition: Condition, v: Tensor) -> Tensor:
    """J_{m_#}(x_k)ᵀ v, detached, [B, ...]: one forward and one backward pass, frozen."""
    x = x.detach().requires_grad_()
    with policy.reference(), torch.enable_grad():
        m = kernels.mean(x, policy.eps(x, k.timestep, condition), k)
        (back,) = torch.autograd.grad(m, x, v)
    return back


@dataclass(frozen=True)
class Returns:
    """G_k (`back`) and v_k (`mixed`) along a stretch of L transitions, [B, L+1, ...]."""

    back: Tensor
    mixed: Tensor


def lambda_returns(
    policy: Policy,
    table: KernelTable,
    x: Tensor,
    first: Tensor,
    condition: Condition,
    end: Tensor,
    *,
    lam: float,
    value: Value | None = None,
) -> Returns:
    """One sweep back over a stretch of each path.

    x: [B, L+1, ...] the samples x_first … x_{first+L}; first: [B] integers. end: [B, ...] v at the
    last of them. value: V(x_{k+1}) given the step k that led there; not needed for λ = 1. At the
    stretch's first sample v is left equal to G: nobody learns from it.
    """
    back, mixed = torch.zeros_like(x), torch.zeros_like(x)
    length = x.shape[1] - 1
    back[:, length] = mixed[:, length] = end
    for j in range(length - 1, -1, -1):
        k = table.at(first + j, x[:, j])
        back[:, j] = mixed[:, j] = pull_back(policy, x[:, j], k, condition, mixed[:, j + 1])
        if value is not None and j > 0:
            v = value(x[:, j], table.at(first + j - 1, x[:, j]), condition)
            mixed[:, j] = (1 - lam) * v + lam * back[:, j]
    return Returns(back, mixed)


@dataclass(frozen=True)
class Found:
    """Of M chosen transitions: G_k at x_k, and v_{k+1} at x_{k+1}, [M, ...] each."""

    here: Tensor
    after: Tensor


def sweep(
    chosen: Selection,
    first: Tensor,
    length: int,
    chunk: int,
    returns: Callable[[Tensor, Tensor, Condition], Returns],
) -> Found:
    """The returns over the stretch first .. first+length of each path, at the chosen transitions.

    first: [B] integers. chunk: paths at a time. returns: (x [b, length+1, ...], first [b],
    condition) -> Returns. A transition that leads to its stretch's first sample only has `after`.
    """
    paths = chosen.paths
    parts = []
    for rows in torch.arange(len(paths.condition)).split(chunk):
        states = first[rows, None] + torch.arange(length + 1)
        x = paths.x[rows[:, None].to(paths.x.device), states.to(paths.x.device)]
        parts.append(returns(x, first[rows], paths.condition[rows]))
    row, j = chosen.row.to(paths.x.device), (chosen.step - first[chosen.row]).to(paths.x.device)
    back = torch.cat([part.back for part in parts])
    mixed = torch.cat([part.mixed for part in parts])
    return Found(here=back[row, j.clamp(min=0)], after=mixed[row, j + 1])
