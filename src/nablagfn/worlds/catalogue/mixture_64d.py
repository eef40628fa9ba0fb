"""Eight modes of unequal weight in 64-D and a mildly quadratic reward.

The reward pulls along a direction that no mode lies on, and bends across two others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..mixture import Mixture, Quadratic
from ..world import World, vector

DIM = 64


def waves(*frequencies: float) -> Tensor:
    """Unit vectors sin(ω·1), …, sin(ω·64), one for each ω, [K, 64].

    Those used below are at right angles to one another, up to five degrees. The sines are
    rounded, so that every machine has the same.
    """
    rows = [[round(math.sin(w * i), 6) for i in range(1, DIM + 1)] for w in frequencies]
    found = torch.tensor(rows, dtype=torch.float64)
    return found / found.norm(dim=1, keepdim=True)


_modes = waves(*(math.sqrt(n) for n in (2, 3, 5, 6, 7, 10, 11, 19)))
_bends = waves(math.sqrt(14), math.sqrt(22))
_weights = vector(0.05, 0.2, 0.1, 0.15, 0.1, 0.2, 0.05, 0.15)
_pull = vector(0.9, -0.3, 0.6, 0.0, -0.6, 0.3, 0.3, -0.9) @ _modes + _bends.sum(0) / 2

WORLD = World(
    title="8 modes in 64-D, quadratic reward",
    mixture=Mixture(
        means=2.5 * _modes,
        weights=_weights,
        variances=torch.linspace(0.04, 0.12, DIM, dtype=torch.float64),
    ),
    reward=Quadratic(
        b=_pull[None],
        A=(torch.outer(_bends[0], _bends[0]) + torch.outer(_bends[1], _bends[1]))[None],
    ),
    beta=1.0,
    prompts=("across the modes",),
)
