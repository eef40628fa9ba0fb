"""Eight modes on a ring and a linear reward: mode masses must differ by factors up to e^8."""

from __future__ import annotations

from ..mixture import Quadratic
from ..world import World, ring, vector

WORLD = World(
    title="ring of 8 modes, r = x₁",
    mixture=ring(8, radius=2.0, std=0.25),
    reward=Quadratic.linear(vector(1.0, 0.0)[None]),
    beta=2.0,
    prompts=("east",),
)
