"""The optimizer of a run, with separate settings for θ and the objective's own φ."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import nn

from ..config import ConfigError, Training


def build_optimizer(
    training: Training,
    policy: list[nn.Parameter],
    own: list[nn.Parameter],
    *,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """One optimizer with two groups. LION is lucidrains' lion-pytorch, the 8-bit AdamW that of
    bitsandbytes. Raises ConfigError when the package is not installed.
    """
    groups = [{"params": policy, "lr": training.lr, "weight_decay": training.adam_weight_decay}]
    if own:
        groups.append({"params": own, "lr": training.flow_lr, "weight_decay": training.flow_wd})
    betas = (training.adam_beta1, training.adam_beta2)
    if training.optimizer == "lion":
        return _of_package("lion_pytorch", "Lion", "lion")(groups, betas=betas)
    if training.optimizer == "adamw8bit":
        kind = _of_package("bitsandbytes.optim", "AdamW8bit", "adamw8bit")
        return kind(groups, betas=betas, eps=training.adam_epsilon)
    return torch.optim.AdamW(groups, betas=betas, eps=training.adam_epsilon, fused=fused or None)


def _of_package(module: str, name: str, extra: str) -> Any:
    """An optimizer's class from an optional package."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        raise ConfigError(
            f"config.training.optimizer={extra} needs a package that is not installed: "
            f"pip install 'nablagfn[{extra}]'"
        ) from None


def schedule_lr(optimizer: torch.optim.Optimizer, training: Training, progress: float) -> None:
    """Set both learning rates; progress: share of the run's updates done, in [0, 1]."""
    factor = 1.0 if training.lr_schedule == "constant" else 0.5 * (1 + math.cos(math.pi * progress))
    for group, rate in zip(optimizer.param_groups, (training.lr, training.flow_lr), strict=False):
        group["lr"] = rate * factor
