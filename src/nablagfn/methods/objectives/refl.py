"""ReFL (Xu et al. 2023, ImageReward, arXiv 2304.05977, eq. 5 and algorithm 1).

    loss = −β·r(decode(x̂_θ(x_k))),   k uniform among the last ⌈share·N⌉ steps

x_k is drawn without gradient; the reward's gradient passes one prediction x̂_θ.

Left out of the paper's loss: the map φ (ReLU(2 − r) in its code), which is made for the scale of
one reward model and stops the gradient of pictures that it scores above 2; and the pretraining
loss, which needs pictures with captions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...core import kernels
from ...core.kernels import KernelTable
from ...core.log_reward import LogReward
from ...core.types import Losses, Objective, Policy, Transitions
from ..parts import Parts


class ReFL(Objective):
    """share: of the steps, counted from the clean end (the paper: the last 10 of 40)."""

    def __init__(
        self, policy: Policy, log_reward: LogReward, table: KernelTable, *, share: float
    ) -> None:
        self.policy = policy
        self.log_reward = log_reward
        self.table = table
        self.share = share
        self.modules = nn.ModuleDict()

    def choose(self, num_steps: int, generator: torch.Generator) -> Tensor:
        """[1] one step among the last ⌈share·N⌉, uniformly."""
        among = max(1, math.ceil(num_steps * self.share - 1e-9))
        return num_steps - 1 - torch.randint(among, (1,), generator=generator)

    def losses(self, batch: Transitions) -> Losses:
        k = self.table.at(batch.step, batch.x)
        with torch.enable_grad():
            output = self.policy.output(batch.x, k.here.time, batch.condition)
            x_clean = kernels.predict_clean(batch.x, output, k.here)
            return Losses({"reward": -self.log_reward(x_clean, batch.condition)})


def build(p: Parts) -> Objective:
    """The method refl."""
    return ReFL(p.policy, p.log_reward, p.table, share=p.config.method.refl_share)
