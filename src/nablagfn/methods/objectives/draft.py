"""DRaFT-K (Clark et al. 2024, arXiv 2309.17400, section 4): the reward's gradient through sampling.

    loss = −β·r(decode(x_N)),   x_{k+1} = m_θ(x_k) + σ_k·z_k with gradient for the last K steps only

The last K steps of each drawn path are walked again with the noise that drove them, so that the
sample is the drawn one. K = N is DRaFT, the whole gradient of E[β·r(x_N)].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core.kernels import KernelTable
from ...core.lookahead import LogReward
from ...core.rollout import noise_of, replay
from ...core.types import Losses, Objective, Policy, Selection, Transitions


class DraftK(Objective):
    """steps: K, at most N of them are taken."""

    def __init__(
        self, policy: Policy, log_reward: LogReward, table: KernelTable, *, steps: int
    ) -> None:
        self.policy = policy
        self.log_reward = log_reward
        self.table = table
        self.steps = steps
        self.modules = nn.ModuleDict()

    def choose(self, num_steps: int, generator: torch.Generator) -> Tensor:
        """[1] the step N−K where the gradient starts."""
        return torch.tensor([max(0, num_steps - self.steps)])

    def prepare(self, chosen: Selection) -> Mapping[str, Tensor]:
        """noise [M, K, ...] of each path's last K steps."""
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
