"""What an update looked like at each noise level: per-step averages of everything an objective
logs, and the signal-to-noise ratio of what it learns from.

It knows no objective: names and values come from `Losses`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..runtime.distributed import total

BINS = 5  # noise levels told apart


def bin_edges(num_steps: int, bins: int = BINS) -> list[tuple[int, int]]:
    """First and last step of each of `bins` (at most `num_steps`) stretches of equal length."""
    parts = torch.arange(num_steps).tensor_split(min(bins, num_steps))
    return [(int(part[0]), int(part[-1])) for part in parts]


def signal_to_noise(count: Tensor, vector_sum: Tensor, square_sum: Tensor) -> Tensor:
    """S/(q − S): the squared mean of n vectors over their variance, from their sums.

    count: [K] n. vector_sum: [K, D] Σg. square_sum: [K] Σ‖g‖² = n·q. S = (‖Σg‖² − Σ‖g‖²)/(n(n−1))
    estimates ‖E g‖² without bias (pairs of different vectors), so it may be below 0. [K]; NaN
    where n < 2, and where all vectors are the same.
    """
    pairs = count * (count - 1)
    signal = (vector_sum.square().sum(1) - square_sum) / pairs
    noise = square_sum / count - signal
    return torch.where((pairs > 0) & (noise > 0), signal / noise, torch.nan)


class StepDiagnostics:
    """Collects one update's transitions, in any number of micro-batches."""

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self.edges = bin_edges(num_steps)
        last = torch.tensor([edge[1] for edge in self.edges])
        self._bin_of = torch.searchsorted(last, torch.arange(num_steps))
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._vectors: dict[str, Tensor] = {}

    def add(
        self, step: Tensor, values: Mapping[str, Tensor], vectors: Mapping[str, Tensor]
    ) -> None:
        """step: [M] on the CPU. values: [M] each. vectors: [M, ...] each."""
        where = self._bin_of[step].to(self._device, non_blocking=True)
        self._accumulate(self._sums, "count", where, torch.ones_like(where, dtype=torch.float32))
        for name, value in values.items():
            self._accumulate(self._sums, name, where, value)
        for name, value in vectors.items():
            flat = value.flatten(1)
            self._accumulate(self._vectors, name, where, flat)
            self._accumulate(self._sums, f"{name}_square", where, flat.square().sum(1))

    def _accumulate(self, into: dict[str, Tensor], name: str, where: Tensor, value: Tensor) -> None:
        if name not in into:
            shape = (len(self.edges), *value.shape[1:])
            into[name] = torch.zeros(shape, dtype=value.dtype, device=value.device)
        into[name].index_add_(0, where, value.detach())

    def row(self, accelerator: Accelerator) -> dict[str, Any]:
        """Averages per bin over all processes, by name; None for a bin without transitions."""
        sums = {name: total(accelerator, value) for name, value in sorted(self._sums.items())}
        count = sums.pop("count")
        snr = {
            name: signal_to_noise(count, total(accelerator, vector), sums.pop(f"{name}_square"))
            for name, vector in sorted(self._vectors.items())
        }
        found = {name: value / count for name, value in sums.items()}
        found |= {f"{name}_snr": value for name, value in snr.items()}
        return {
            "steps": self.edges,
            "count": [int(n) for n in count.tolist()],
            **{name: _plain(value) for name, value in found.items()},
        }


def _plain(value: Tensor) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in value.tolist()]
