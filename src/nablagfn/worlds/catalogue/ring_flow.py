"""The ring of a flow model: α = 1 − t, σ = t from pure noise, and the exact velocity as output."""

from __future__ import annotations

from ..mixture import Quadratic
from ..world import FLOW, World, ring, vector

WORLD = World(
    title="flow-matching ring of 8 modes, r = x₁",
    mixture=ring(8, radius=2.0, std=0.25),
    reward=Quadratic.linear(vector(1.0, 0.0)[None]),
    beta=2.0,
    prompts=("east",),
    noising=FLOW,
    prediction="flow",
)
