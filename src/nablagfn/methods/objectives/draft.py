"""DRaFT-K and AlignProp: the reward's gradient through the last steps of sampling.

    loss = −β·r(decode(x_N)),   x_{k+1} = m_θ(x_k) + σ_k·z_k with gradient for the last K steps only

The last K steps of each drawn path are walked again with the noise that drove them, so that the
sample is the drawn one. K = N is DRaFT, the whole gradient of E[β·r(x_N)].

DRaFT-K (Clark et al. 2024, arXiv 2309.17400, section 4) fixes K. AlignProp (Prabhudesai et al.
2023, arXiv 2310.03739, eq. 5) draws it for each path and update, uniform in 1..N: early steps learn
too, at half the cost of all N. That does not make the truncated gradient unbiased: step k learns
with probability (k+1)/N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.kernels import KernelTable
from ...core.log_reward import LogReward
from ...core.rollout import noise_of, replay
from ...core.types import Losses, Objective, Policy, Selection, Signals, Transitions
from ..parts import Parts


@dataclass(frozen=True)
class Noise(Signals):
    """noise: [M, K, ...] of each path's last K steps, K the largest of this update."""

    noise: Tensor


class TruncatedBackpropagation(Objective):
    """steps: K, at most N of them are taken; None: drawn for each path and update."""

    def __init__(
        self, policy: Policy, log_reward: LogReward, table: KernelTable, *, steps: int | None
    ) -> None:
        self.policy = policy
        self.log_reward = log_reward
        self.table = table
        self.steps = steps
        self.modules = nn.ModuleDict()

    def choose(self, num_steps: int, generator: torch.Generator) -> Tensor:
        """[1] the step N−K where the gradient starts."""
        if self.steps is None:
            return torch.randint(num_steps, (1,), generator=generator)
        return torch.tensor([max(0, num_steps - self.steps)])

    def prepare(self, chosen: Selection) -> Noise:
        return Noise(chosen.of_each(noise_of(chosen.paths, self.table, int(chosen.step.min()))))

    def losses(self, batch: Transitions) -> Losses:
        assert isinstance(batch.signals, Noise)
        with torch.enable_grad():
            x_clean = replay(
                self.policy,
                self.table,
                batch.x,
                batch.step,
                batch.signals.noise,
                batch.condition,
            )
            return Losses({"reward": -self.log_reward(x_clean, batch.condition)})


def build(p: Parts) -> Objective:
    """The method draft-k."""
    steps = p.config.method.draft_steps
    return TruncatedBackpropagation(p.policy, p.log_reward, p.table, steps=steps)


def build_alignprop(p: Parts) -> Objective:
    """The method alignprop."""
    return TruncatedBackpropagation(p.policy, p.log_reward, p.table, steps=None)
