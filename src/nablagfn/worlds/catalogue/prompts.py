"""The ring with three prompts, each with its own reward: a stale prompt draws the wrong modes."""

from __future__ import annotations

import torch

from ..mixture import Quadratic
from ..world import World, ring, vector

WORLD = World(
    title="ring of 8 modes, three prompts",
    mixture=ring(8, radius=2.0, std=0.25),
    reward=Quadratic.linear(torch.stack([vector(1.0, 0.0), vector(-0.5, 0.8), vector(0.0, -1.0)])),
    beta=1.5,
    prompts=("towards the east", "towards the north-west", "towards the south"),
)
