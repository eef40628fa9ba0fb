"""The only sampling loop, and the choice of transitions to learn from (layer 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .kernels import KernelTable
from .types import Condition, Policy, Trajectories, Transitions


def rollout(
    policy: Policy, table: KernelTable, noise: Tensor, condition: Condition
) -> Trajectories:
    """Draw one trajectory per row of `noise` from the policy as it is now.

    noise: [B, N+1, ...] standard normal; noise[:, 0] is x_0 and noise[:, k+1] drives transition k.
    """
    noise = noise.to(policy.device)
    x = noise[:, 0]
    path, predictions = [x], []
    with torch.no_grad():
        for step in range(table.num_steps):
            k = table.at(torch.full((len(x),), step), x)
            eps = policy.eps(x, k.timestep, condition)
            x = kernels.mean(x, eps, k) + k.std * noise[:, step + 1]
            path.append(x)
            predictions.append(eps)
    return Trajectories(torch.stack(path, 1), torch.stack(predictions, 1), condition)


def subsample_steps(
    num_steps: int, fraction: float, low_variance: bool, generator: torch.Generator
) -> Tensor:
    """Which steps of one trajectory to learn from: [n+1] integers, the last step always among them.

    n = ⌊fraction·N⌋ (at least 1) steps: without replacement, or with `low_variance` one from each
    of n equal strata. fraction >= 1 gives all N steps once.
    """
    if fraction >= 1:
        return torch.arange(num_steps)
    n = max(1, int(num_steps * fraction + 1e-9))
    if low_variance:
        edges = torch.linspace(0, num_steps, n + 1, dtype=torch.float64)
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        steps = (edges[:-1] + u * edges.diff()).long()
    else:
        steps = torch.randperm(num_steps, generator=generator)[:n]
    return torch.cat([steps, torch.tensor([num_steps - 1])])


def transitions(trajectories: Trajectories, row: Tensor, step: Tensor) -> Transitions:
    """The transitions (row[i], step[i]) of the trajectories; row, step: [M] integers."""
    here = row.to(trajectories.x.device)
    k = step.to(trajectories.x.device)
    return Transitions(
        x=trajectories.x[here, k],
        x_next=trajectories.x[here, k + 1],
        eps_old=trajectories.eps[here, k],
        step=step,
        condition=trajectories.condition[row],
    )
