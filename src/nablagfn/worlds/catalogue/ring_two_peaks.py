"""The ring with a reward of two peaks of unequal height: the way up turns between them.

Neither peak lies on a mode nor opposite to the other, so the target has no symmetry of the ring.
"""

from __future__ import annotations

import torch

from ..rewards import Peaks
from ..world import World, ring, vector

WORLD = World(
    title="ring of 8 modes, two peaks",
    mixture=ring(8, radius=2.0, std=0.25),
    reward=Peaks(
        centres=torch.stack([vector(1.9, 0.5), vector(-1.0, 1.4)])[None],
        heights=vector(1.0, 0.5)[None],
        widths=vector(1.0, 0.8)[None],
    ),
    beta=1.5,
    prompts=("near (1.9, 0.5) or (-1, 1.4)",),
)
