"""The ring with a reward that saturates: flat where it is high, flat where it is low.

Between the modes that gain and those that lose, the value has a cliff; at both ends ∇r says next to
nothing of how much a mode must gain.
"""

from __future__ import annotations

from ..rewards import Saturating
from ..world import World, ring, vector

WORLD = World(
    title="ring of 8 modes, r = tanh(1.5·x₁ + 0.5·x₂ − 1)",
    mixture=ring(8, radius=2.0, std=0.25),
    reward=Saturating(b=vector(1.5, 0.5)[None], c=vector(1.0)),
    beta=2.5,
    prompts=("beyond the line",),
)
