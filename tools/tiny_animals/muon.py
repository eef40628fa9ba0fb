"""Muon: momentum whose update matrices are orthogonalised; Adam for vectors.

After K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with
the update scaled to AdamW's usual size, so that AdamW's learning rates carry over.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Push all singular values of [R, C] to about 1 by a quintic Newton-Schulz iteration."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-8)
    for _ in range(rounds):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two or more dimensions, Adam for the rest."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = self._matrix(p, group) if p.ndim > 1 else self._vector(p, group)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def _matrix(self, p: nn.Parameter, group: dict) -> Tensor:
        state = self.state[p]
        if "m" not in state:
            state["m"] = torch.zeros_like(p)
        state["m"].lerp_(p.grad, 1 - group["momentum"])
        ahead = p.grad.lerp(state["m"], group["momentum"])
        flat = orthogonalise(ahead.reshape(len(p), -1))
        return 0.2 * max(flat.shape) ** 0.5 * flat.reshape(p.shape)

    def _vector(self, p: nn.Parameter, group: dict) -> Tensor:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if "m" not in state:
            state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] = torch.zeros(())
        state["step"] += 1
        n = float(state["step"])
        state["m"].lerp_(p.grad, 1 - beta1)
        state["v"].lerp_(p.grad.square(), 1 - beta2)
        root = (state["v"] / (1 - beta2**n)).sqrt_().add_(1e-8)
        return state["m"] / (1 - beta1**n) / root
