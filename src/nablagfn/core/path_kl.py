"""How far the finetuned sampler has moved: the KL of the path measures p_θ‖p_#.

Both are Markov chains of Gaussians with the same σ_k, so by the chain rule of the KL

    KL(p_θ‖p_#) = E_{p_θ} Σ_k KL(p_θ(·|x_k)‖p_#(·|x_k)) = E_{p_θ} Σ_k ½‖(m_θ − m_#)(x_k)/σ_k‖²

(Girsanov's formula in discrete time). By data processing it bounds the KL of the clean samples.

The same pass gives each path's weight against the target p_#(path)·exp(β·r(x_N))/Z:

    log w = β·r(x_N) − Σ_k log p_θ(x_{k+1}|x_k)/p_#(x_{k+1}|x_k)

Exact, because every step is Gaussian; constant (log Z) for a sampler that hits its target. Where
the policy moves the mean of the first state (`core.start`), what that costs is counted with step 0.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from . import start
from .kernels import KernelTable, Step, log_ratio, moved_mean
from .types import Policy, Trajectories


def step_kl(output: Tensor, output_ref: Tensor, k: Step) -> Tensor:
    """KL(p_θ(·|x_k)‖p_#(·|x_k)) = ½‖(c2/σ)(ε_θ − ε_#)‖² in nats, [M]."""
    return 0.5 * moved_mean(output, output_ref, k).square().flatten(1).sum(1)


def step_weights(table: KernelTable) -> Tensor:
    """(c2/σ)² of each step for ε, [N] float64: KL_k = ½·weight·‖Δε‖² of two samplers.

    SNR_{k+1}/SNR_k − 1 at η = 1. From no signal at all, where ε says nothing of the clean sample,
    it is that of the network's own output.
    """
    alpha, sigma = table.schedule.alpha[:-1], table.schedule.sigma[:-1]
    c2 = torch.where(alpha > 0, table.on_clean * sigma / alpha, table.c2)
    return (c2 / table.std).square()


@dataclass(frozen=True, eq=False)
class PathRatio:
    """Paths of the policy against the pretrained model's, step by step, [B, N] each, nats.

    kl: KL(p_θ(·|x_k)‖p_#(·|x_k)). log_ratio: log p_θ(x_{k+1}|x_k)/p_#(x_{k+1}|x_k) of the step
    that was taken, whose mean over the policy's paths is that of kl. Step 0 has the first state's,
    too. output_ref: [B, N, ...] u_#(x_k), where it was to be kept.
    """

    kl: Tensor
    log_ratio: Tensor
    output_ref: Tensor | None = None


def log_weight(log_ratio: Tensor, reward: Tensor, beta: float, base_share: float = 0.0) -> Tensor:
    """log w of paths, [B] float64: of the policy's, or of some with a share a of the pretrained
    model's among them, log w = β·r − log((1 − a)·p_θ/p_# + a).

    With a > 0 no weight exceeds exp(βr)/a, whatever the policy has learned: a defensive mixture
    (Hesterberg, Technometrics 1995, of importance sampling). log_ratio: [B] log p_θ/p_# of the
    paths. reward: [B] r of their pictures. base_share: a, 0 ≤ a < 1.
    """
    drawn = log_ratio.double()
    if base_share:
        part = drawn.new_tensor(math.log(base_share))
        drawn = torch.logaddexp(drawn + math.log1p(-base_share), part)
    return beta * reward.double() - drawn


def path_ratio(
    policy: Policy,
    table: KernelTable,
    paths: Trajectories,
    *,
    of_reference: bool = False,
    keep_reference: bool = False,
) -> PathRatio:
    """Of paths drawn by the policy as it is, or of_reference: by the pretrained model.

    Costs N evaluations of the other of the two a path. Raises ValueError for a sampler without
    noise, whose paths have no density (`core.transport`).
    """
    if table.ode:
        raise ValueError("paths without noise (eta = 0) have no density, and so no path KL")
    kl, ratios, kept = [], [], []
    first = start.mean_of(policy)
    with torch.no_grad(), nullcontext() if of_reference else policy.reference():
        for step in range(paths.num_steps):
            x = paths.x[:, step]
            k = table.at_step(step, x)
            output = paths.output[:, step]
            output_ref = policy.output(x, k.here.time, paths.condition)
            if of_reference:
                output, output_ref = output_ref, output
            kl.append(step_kl(output, output_ref, k))
            if keep_reference:
                kept.append(output_ref)
            moved = log_ratio(x, paths.x[:, step + 1], output, output_ref, k)
            ratios.append(moved.flatten(1).double().sum(1))
    if first is not None:
        kl[0] = kl[0] + start.kl(first, table.start_std)
        ratios[0] = ratios[0] + start.log_ratio(paths.x[:, 0], first, table.start_std)
    reference = torch.stack(kept, 1) if keep_reference else None
    return PathRatio(torch.stack(kl, 1), torch.stack(ratios, 1), reference)


def path_kl(policy: Policy, table: KernelTable, paths: Trajectories) -> Tensor:
    """Each step's KL along paths drawn by the policy as it is, in nats, [B, N].

    The mean over paths of the rows' sums estimates KL(p_θ‖p_#).
    """
    return path_ratio(policy, table, paths).kl
