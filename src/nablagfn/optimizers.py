"""The optimizer of a run: AdamW or LION, with separate settings for θ and the objective's own φ."""

from __future__ import annotations

import math

import torch
from torch import nn

from .config import Training


def build_optimizer(
    training: Training, policy: list[nn.Parameter], own: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """One optimizer with two groups. The LION implementation is lucidrains' lion-pytorch."""
    groups = [{"params": policy, "lr": training.lr, "weight_decay": training.adam_weight_decay}]
    if own:
        groups.append({"params": own, "lr": training.flow_lr, "weight_decay": training.flow_wd})
    betas = (training.adam_beta1, training.adam_beta2)
    if training.optimizer == "lion":
        from lion_pytorch import Lion

        return Lion(groups, betas=betas)
    return torch.optim.AdamW(groups, betas=betas, eps=training.adam_epsilon)


def schedule_lr(optimizer: torch.optim.Optimizer, training: Training, progress: float) -> None:
    """Set both learning rates; progress: share of the run's updates done, in [0, 1]."""
    factor = 1.0 if training.lr_schedule == "constant" else 0.5 * (1 + math.cos(math.pi * progress))
    for group, rate in zip(optimizer.param_groups, (training.lr, training.flow_lr), strict=False):
        group["lr"] = rate * factor
