"""Five modes in the plane, each with a covariance of its own, and a linear reward.

Long modes gain from the reward along their length, round ones as a whole: the same ∇r moves the
mean of each mode by another vector βC_k∇r.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..mixture import Quadratic
from ..shaped import ShapedMixture
from ..world import World, vector


def ellipse(length: float, width: float, degrees: float) -> Tensor:
    """The covariance [2, 2] of standard deviations `length` and `width`, turned to the left."""
    angle = math.radians(degrees)
    along = vector(math.cos(angle), math.sin(angle))
    across = vector(-math.sin(angle), math.cos(angle))
    return length**2 * torch.outer(along, along) + width**2 * torch.outer(across, across)


WORLD = World(
    title="5 modes of different shape, linear reward",
    mixture=ShapedMixture.of(
        means=torch.stack(
            [
                vector(0.0, 0.0),
                vector(2.2, 0.6),
                vector(-0.4, 2.0),
                vector(-2.2, -0.4),
                vector(0.8, -2.0),
            ]
        ),
        weights=vector(0.2, 0.1, 0.25, 0.25, 0.2),
        covariances=torch.stack(
            [
                ellipse(0.2, 0.2, 0),
                ellipse(0.6, 0.12, 100),
                ellipse(0.8, 0.15, 15),
                ellipse(0.6, 0.2, 60),
                ellipse(0.7, 0.12, -30),
            ]
        ),
    ),
    reward=Quadratic.linear(vector(0.8, 0.6)[None]),
    beta=1.2,
    prompts=("up and to the right",),
)
