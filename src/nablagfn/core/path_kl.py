"""How far the finetuned sampler has moved: the KL of the path measures p_θ‖p_#.

Both are Markov chains of Gaussians with the same σ_k, so by the chain rule of the KL

    KL(p_θ‖p_#) = E_{p_θ} Σ_k KL(p_θ(·|x_k)‖p_#(·|x_k)) = E_{p_θ} Σ_k ½‖(m_θ − m_#)(x_k)/σ_k‖²

(Girsanov's formula in discrete time). By data processing it bounds the KL of the clean samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import KernelTable, Step
from .types import Policy, Trajectories


def step_kl(output: Tensor, output_ref: Tensor, k: Step) -> Tensor:
    """KL(p_θ(·|x_k)‖p_#(·|x_k)) = ½‖(c2/σ)(ε_θ − ε_#)‖² in nats, [M]."""
    return 0.5 * (k.c2 / k.std * (output - output_ref)).square().flatten(1).sum(1)


def path_kl(policy: Policy, table: KernelTable, paths: Trajectories) -> Tensor:
    """Each step's KL along paths drawn by the policy as it is, in nats, [B, N].

    The mean over paths of the rows' sums estimates KL(p_θ‖p_#). Costs N evaluations of the frozen
    model a path; `paths.output` are the policy's own.
    """
    found = []
    with torch.no_grad(), policy.reference():
        for step in range(paths.num_steps):
            x = paths.x[:, step]
            k = table.at_step(step, x)
            output_ref = policy.output(x, k.here.time, paths.condition)
            found.append(step_kl(paths.output[:, step], output_ref, k))
    return torch.stack(found, 1)
