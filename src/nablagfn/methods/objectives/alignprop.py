"""AlignProp (Prabhudesai et al. 2023, arXiv 2310.03739, eq. 5): randomly truncated backpropagation.

    loss = −β·r(decode(x_N)),   gradient through the last K steps, K uniform in 1..N for each path

As DRaFT-K, with K drawn anew for each path and update: early steps learn too, at half the cost of
all N. Drawing K does not make the truncated gradient unbiased: step k learns with probability
(k+1)/N.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core.kernels import KernelTable
from ...core.lookahead import LogReward
from ...core.rollout import noise_of, replay
from ...core.types import Losses, Objective, Policy, Selection, Transitions


class AlignProp(Objective):
    """Truncation at a random step; nothing to set."""

    def __init__(self, policy: Policy, log_reward: LogReward, table: KernelTable) -> None:
        self.policy = policy
        self.log_reward = log_reward
        self.table = table
        self.modules = nn.ModuleDict()

    def choose(self, num_steps: int, generator: torch.Generator) -> Tensor:
        """[1] the step N−K where the gradient starts, uniform in 0..N−1."""
        return torch.randint(num_steps, (1,), generator=generator)

    def prepare(self, chosen: Selection) -> Mapping[str, Tensor]:
        """noise [M, K, ...] of each path's last K steps, K the largest of this update."""
        return {"noise": noise_of(chosen.paths, self.table, int(chosen.step.min()))[chosen.row]}

    def losses(self, batch: Transitions) -> Losses:
        with torch.enable_grad():
            x_clean = replay(
                self.policy,
                self.table,
                batch.x,
                batch.step,
                batch.signals["noise"],
                batch.condition,
            )
            return Losses({"reward": -self.log_reward(x_clean, batch.condition)})
