"""DRaFT-LV (Clark et al. 2024, arXiv 2309.17400, section 4): DRaFT-1 with less variance.

    x_{N−1} ~ q(x_{N−1}|x_N),   loss = −(1/n)·Σ over n copies of β·r(decode(x̂_θ(x_{N−1})))

Each drawn sample is noised n times to the level of the last step and denoised in one step with
gradient. A copy is a transition here, so the mean over transitions is the mean over copies.

Where this differs: x_N has the level ᾱ_N = alphas_cumprod[0] and not 1, so q adds the noise between
the two levels only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core import kernels, rng
from ...core.kernels import KernelTable
from ...core.log_reward import LogReward
from ...core.types import Losses, Objective, Policy, Selection, Signals, Transitions
from ..parts import Parts


@dataclass(frozen=True)
class FreshNoise(Signals):
    """noise: [M, ...], fresh: the path's own noises are not independent of x_N."""

    noise: Tensor


class DraftLV(Objective):
    """copies: n, noisy copies of each sample (the paper: 2)."""

    def __init__(
        self, policy: Policy, log_reward: LogReward, table: KernelTable, *, copies: int
    ) -> None:
        self.policy = policy
        self.log_reward = log_reward
        self.table = table
        self.copies = copies
        self.modules = nn.ModuleDict()

    def choose(self, num_steps: int, generator: torch.Generator) -> Tensor:
        """[n] the last step, once per copy."""
        return torch.full((self.copies,), num_steps - 1)

    def prepare(self, chosen: Selection) -> FreshNoise:
        assert chosen.seed is not None
        x = chosen.paths.clean
        shape, seeds = tuple(x.shape[1:]), chosen.seed.tolist()
        noise = rng.normal(shape, seeds, seed=0, purpose="draft-lv", dtype=x.dtype)
        return FreshNoise(noise.to(x.device, non_blocking=True))

    def losses(self, batch: Transitions) -> Losses:
        assert isinstance(batch.signals, FreshNoise)
        k = self.table.at(batch.step, batch.x)
        x = kernels.renoise(batch.x_next, batch.signals.noise, k)
        with torch.enable_grad():
            output = self.policy.output(x, k.here.time, batch.condition)
            x_clean = kernels.predict_clean(x, output, k.here)
            return Losses({"reward": -self.log_reward(x_clean, batch.condition)})


def build(p: Parts) -> Objective:
    """The method draft-lv."""
    return DraftLV(p.policy, p.log_reward, p.table, copies=p.config.method.draft_lv_samples)
