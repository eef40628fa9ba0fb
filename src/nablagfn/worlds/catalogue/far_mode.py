"""A rare mode, far from the others, that the reward wants: 2 % must become about a third.

A sampler that explores little rarely sees it, and one that is greedy ends in it.
"""

from __future__ import annotations

import torch

from ..mixture import Mixture, Quadratic
from ..world import World, vector

WORLD = World(
    title="a rare far mode in 4-D, linear reward",
    mixture=Mixture(
        means=torch.stack(
            [
                vector(-1.0, 0.8, 0.0, 0.5),
                vector(-0.6, -1.0, 0.6, -0.4),
                vector(-1.2, 0.2, -1.0, 0.0),
                vector(3.5, 1.0, 1.0, -0.5),
            ]
        ),
        weights=vector(0.4, 0.33, 0.25, 0.02),
        variances=torch.full((4,), 0.09, dtype=torch.float64),
    ),
    reward=Quadratic.linear(vector(1.0, 0.3, 0.0, 0.0)[None]),
    beta=0.7,
    prompts=("the far mode",),
)
