"""DDPO (Black et al. 2024, arXiv 2305.13301, section 4.3): the clipped policy gradient.

    loss = max(−A·ρ, −A·clip(ρ, 1−c, 1+c)),   ρ = exp( mean over elements of
                                                  log [p_θ(x_{k+1}|x_k) / p_θ†(x_{k+1}|x_k)] )
    A = clip((r − mean)/(std + 1e-6), ±a),   mean and std of the last rewards of the same prompt

θ† drew the samples: at the first update after sampling ρ = 1 and the gradient is REINFORCE's,
−A·∇log p_θ divided by the number of elements. The mean over elements instead of the sum is the
authors' code's, and its c = 1e-4 was set for it. Needs the reward's values only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...config import ConfigError
from ...core import kernels
from ...core.kernels import KernelTable
from ...core.rollout import StepChoice
from ...core.types import Losses, Objective, Policy, Selection, Signals, Transitions, beside
from ..parts import Parts


class PromptStatistics(nn.Module):
    """The last `size` rewards of each prompt, as buffers, so that checkpoints keep them.

    rewards: [P, size] float64, a ring per prompt. count: [P] rewards ever seen. epoch: [2] mean and
    deviation of the newest epoch's rewards. All deviations are divided by n. On the CPU.
    """

    rewards: Tensor
    count: Tensor
    epoch: Tensor

    def __init__(self, prompts: Sequence[str], size: int, min_count: int) -> None:
        super().__init__()
        self.row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        self.min_count = min_count
        shape = (len(self.row), size)
        self.register_buffer("rewards", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(len(self.row), dtype=torch.long))
        self.register_buffer("epoch", torch.zeros(2, dtype=torch.float64))

    def add(self, prompts: Sequence[str], reward: Tensor) -> None:
        """One epoch's rewards [B], oldest first."""
        values = reward.double().cpu()
        self.epoch.copy_(torch.stack([values.mean(), values.std(unbiased=False)]))
        for prompt, value in zip(prompts, values, strict=True):
            row = self.row[prompt]
            self.rewards[row, self.count[row] % self.rewards.shape[1]] = value
            self.count[row] += 1

    def of(self, prompt: str) -> Tensor:
        """[2] mean and deviation: the epoch's while fewer than `min_count` are remembered."""
        row = self.row[prompt]
        kept = self.rewards[row, : int(self.count[row])]
        if len(kept) < self.min_count:
            return self.epoch
        return torch.stack([kept.mean(), kept.std(unbiased=False)])

    def advantage(self, prompts: Sequence[str], reward: Tensor) -> Tensor:
        """(r − mean)/(std + 1e-6) of the rewards [B], each against its own prompt's."""
        found = {prompt: self.of(prompt) for prompt in dict.fromkeys(prompts)}
        usual = beside(torch.stack([found[prompt] for prompt in prompts]), reward)
        mean, std = usual.unbind(1)
        return ((reward.double() - mean) / (std + 1e-6)).to(reward)


@dataclass(frozen=True)
class Advantage(Signals):
    """advantage: [M], of each transition's own path."""

    advantage: Tensor


class DDPO(Objective):
    """clip: c, of the ratio. advantage_clip: a."""

    uses_reward_gradient = False

    def __init__(
        self,
        policy: Policy,
        table: KernelTable,
        statistics: PromptStatistics,
        *,
        clip: float,
        advantage_clip: float,
        steps: StepChoice = StepChoice(),  # noqa: B008 (frozen)
    ) -> None:
        self.policy = policy
        self.table = table
        self.statistics = statistics
        self.clip = clip
        self.advantage_clip = advantage_clip
        self.steps = steps
        self.modules = nn.ModuleDict({"statistics": statistics})

    def choose(self, num_steps: int, generator: torch.Generator) -> Tensor:
        return self.steps(num_steps, generator)

    def observe(self, prompts: Sequence[str], reward: Tensor) -> None:
        self.statistics.add(prompts, reward)

    def prepare(self, chosen: Selection) -> Advantage:
        assert chosen.paths.reward is not None
        advantage = self.statistics.advantage(chosen.paths.condition.prompts, chosen.paths.reward)
        clipped = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        return Advantage(chosen.of_each(clipped))

    def losses(self, batch: Transitions) -> Losses:
        assert isinstance(batch.signals, Advantage)
        k = self.table.at(batch.step, batch.x)
        with torch.enable_grad():
            output = self.policy.output(batch.x, k.here.time, batch.condition)
            log_ratio = kernels.log_ratio(batch.x, batch.x_next, output, batch.output_old, k)
            ratio = log_ratio.flatten(1).mean(1).exp()
            clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
            advantage = batch.signals.advantage
            surrogate = torch.maximum(-advantage * ratio, -advantage * clipped)
        share = ((ratio - 1).abs() > self.clip).to(ratio.dtype)
        return Losses({"policy": surrogate}, {"ratio_clipped": share.detach()})


def build(p: Parts) -> Objective:
    """The method ddpo."""
    m = p.config.method
    if m.prompt_min_count > m.prompt_buffer:
        raise ConfigError(
            f"config.method.prompt_min_count={m.prompt_min_count} exceeds "
            f"config.method.prompt_buffer={m.prompt_buffer}: no prompt would ever have enough"
        )
    return DDPO(
        p.policy,
        p.table,
        PromptStatistics(p.prompts.prompts, m.prompt_buffer, m.prompt_min_count),
        clip=m.clip_range,
        advantage_clip=m.advantage_clip,
        steps=p.steps,
    )
