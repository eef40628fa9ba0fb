"""How far a finetuned sampler without noise (η = 0) has moved: its transport cost.

Two different ODEs have singular path measures: there is no KL between them. What stands beside
them is the kinetic energy of the change that was made to the velocity of a flow model,

    C(path) = ½∫‖(u_θ − u_#)(x_t, t)‖² dt ≈ ½ Σ_k (t_k − t_{k+1})·‖(u_θ − u_#)(x_k)‖²

along the finetuned model's own paths. It is no KL, bounds none, and is not in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import KernelTable
from .types import Policy, Trajectories


def step_lengths(table: KernelTable) -> Tensor:
    """t_k − t_{k+1} of a flow model's steps, [N] float64: what ½‖u_θ − u_#‖² is weighted by."""
    return -table.time.diff()


def transport_cost(policy: Policy, table: KernelTable, paths: Trajectories) -> Tensor:
    """Each step's part of C, [B, N], of paths drawn by the policy as it is.

    Costs N evaluations of the frozen model a path.
    """
    cost, lengths = [], step_lengths(table).tolist()
    with torch.no_grad(), policy.reference():
        for step, length in enumerate(lengths):
            x = paths.x[:, step]
            k = table.at_step(step, x)
            change = paths.output[:, step] - policy.output(x, k.here.time, paths.condition)
            cost.append(0.5 * length * change.square().flatten(1).sum(1))
    return torch.stack(cost, 1)
