"""Kernel tables for tests."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nablagfn.core.kernels import KernelTable, kernel_table
from nablagfn.core.schedules import DiscreteNoising, schedule_of
from nablagfn.core.types import Policy


def table_of(policy: Policy, num_steps: int, grid: str = "ddim", eta: float = 1.0) -> KernelTable:
    """A policy's sampler on one of its own grids."""
    schedule = schedule_of(policy.noising, policy.times(grid, num_steps))
    return kernel_table(schedule, eta, policy.prediction)


def discrete_table(alphas_cumprod: Tensor, times: Sequence[float], eta: float = 1.0) -> KernelTable:
    """An ε-model's sampler at these times of its training levels [T]."""
    return kernel_table(schedule_of(DiscreteNoising(alphas_cumprod), times), eta, "epsilon")
