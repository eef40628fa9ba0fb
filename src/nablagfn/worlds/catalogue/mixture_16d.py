"""Six modes of unequal weight in 16-D and a linear reward: what holds in the plane holds here."""

from __future__ import annotations

import torch

from ..mixture import Mixture, Quadratic
from ..world import World, vector

# Directions without structure: normal numbers, rounded. Each is scaled to the norm 2.5.
DIRECTIONS = (
    (0.1, 1.3, -0.9, 1.0, -0.3, -0.3, 1.9, 0.2, 0.0, 0.7, 1.1, 0.0, 0.6, -1.0, -0.4, -0.4),
    (-1.3, -1.5, -1.6, -0.2, -0.2, -0.3, 0.1, -1.3, -0.1, 0.2, 0.8, -0.8, -0.4, -2.0, -0.5, -2.2),
    (-1.4, 1.1, -2.2, 0.8, 0.3, -0.3, 0.5, 0.5, 1.0, -0.2, -0.6, -0.6, -1.0, 0.0, -0.8, 1.1),
    (-1.9, -1.1, -1.0, -2.1, 1.9, -2.4, -0.3, -0.5, 1.7, -2.0, 1.1, -0.7, -0.2, -0.7, 0.6, -1.1),
    (-0.1, 0.4, 1.8, -2.4, 1.5, 0.9, -0.5, 0.3, -0.5, 1.6, 0.2, -0.2, -0.2, -0.2, -0.2, -0.9),
    (2.1, -1.9, -3.6, -0.1, -0.1, 0.4, -0.2, -0.1, 0.3, 1.0, -0.4, -0.4, 1.9, 0.5, -1.0, 2.3),
)

_directions = torch.tensor(DIRECTIONS, dtype=torch.float64)

WORLD = World(
    title="6 modes in 16-D, linear reward",
    mixture=Mixture(
        means=2.5 * _directions / _directions.norm(dim=1, keepdim=True),
        weights=vector(0.1, 0.2, 0.15, 0.25, 0.1, 0.2),
        variances=torch.full((16,), 0.09, dtype=torch.float64),
    ),
    reward=Quadratic.linear(torch.full((1, 16), 0.25, dtype=torch.float64)),  # a unit direction
    beta=1.5,
    prompts=("along the diagonal",),
)
