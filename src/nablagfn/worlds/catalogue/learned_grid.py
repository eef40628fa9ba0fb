"""A 3×3 grid of modes whose score is learned, hence inexact, with a mildly quadratic reward.

The target is that of the learned model's own sampler: what it draws, tilted by exp(βr).
"""

from __future__ import annotations

from ..learned import WEIGHTS, LearnedScore, uneven_grid
from ..mixture import Quadratic
from ..world import World, vector

WORLD = World(
    title="learned score of a grid of 9 modes, quadratic reward",
    mixture=LearnedScore.read(WEIGHTS / "learned_grid.safetensors", uneven_grid()),
    reward=Quadratic(b=vector(1.2, -0.5)[None], A=vector(0.0, 0.5).diag()[None]),
    beta=1.0,
    prompts=("to the right, not too high",),
)
