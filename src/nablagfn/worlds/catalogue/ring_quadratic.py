"""The ring with a quadratic reward: the modes change their mass and their shape."""

from __future__ import annotations

from ..mixture import Quadratic
from ..world import World, ring, vector

WORLD = World(
    title="ring of 8 modes, quadratic reward",
    mixture=ring(8, radius=2.0, std=0.25),
    reward=Quadratic(b=vector(1.5, 0.5)[None], A=vector(1.0, 0.5).diag()[None]),
    beta=1.0,
    prompts=("near (1.5, 1)",),
)
