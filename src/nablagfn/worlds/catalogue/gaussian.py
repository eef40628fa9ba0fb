"""An anisotropic Gaussian in 4-D with a quadratic reward: sampler and target are exact Gaussians.

The only world whose distance to the target is measured without any sample of the target.
"""

from __future__ import annotations

from ..mixture import Mixture, Quadratic
from ..world import World, vector

WORLD = World(
    title="Gaussian in 4-D, quadratic reward",
    mixture=Mixture(
        means=vector(0.5, -0.5, 0.0, 1.0)[None],
        weights=vector(1.0),
        variances=vector(1.0, 0.3, 0.1, 0.03),
    ),
    reward=Quadratic(
        b=vector(1.0, -2.0, 1.0, 3.0)[None], A=(vector(2.0, 1.0, 5.0, 0.5).diag() + 0.3)[None]
    ),
    beta=1.0,
    prompts=("bowl",),
)
