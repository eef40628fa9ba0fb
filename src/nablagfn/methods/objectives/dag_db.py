"""DAG-DB (Zhang et al. 2024, arXiv 2406.00633): detailed balance of a scalar flow.

    loss = ( log F̃(x_k) + log p_θ(x_{k+1}|x_k) − log p_#(x_{k+1}|x_k) − log F̃(x_{k+1}) )²
    log F̃(x_k) = β·γ_k·r(decode(x̂(x_k))) + s_φ(x_k),   log F̃(x_N) = β·r(decode(x_N))

in nats², the log-densities summed over elements. s_φ sums the flow network's output over elements.
Zero loss everywhere makes p_θ the sampler of p_#·exp(β·r); F̃(x_0) is then each prompt's own
normaliser, which s_φ has to learn. No gradient of the reward, none into x̂.

Where this differs: the paper has no prior term. It targets R alone, with the noising kernel
q(x_k|x_{k+1}) as backward policy where p_# stands here, and F in place of F̃ = F/F_#.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core import kernels
from ...core.kernels import KernelTable, Level, Step
from ...core.log_reward import LogReward
from ...core.lookahead import Attenuation, row_attenuation
from ...core.rollout import StepChoice
from ...core.types import (
    Condition,
    Losses,
    Objective,
    Policy,
    Selection,
    Signals,
    Transitions,
    beside,
)
from ..parts import Parts


@dataclass(frozen=True)
class EndSignals(Signals):
    """log_reward: [M] log F̃(x_N) = β·r of each transition's own path, as it was measured."""

    log_reward: Tensor


class DagDB(Objective):
    """flow: its output [M, ...] is summed to s_φ [M].

    frozen_guess: x̂ of the pretrained model instead of the finetuned one.
    """

    uses_reward_gradient = False

    def __init__(
        self,
        policy: Policy,
        log_reward: LogReward,
        table: KernelTable,
        mode: Attenuation,
        flow: nn.Module,
        *,
        frozen_guess: bool = False,
        steps: StepChoice = StepChoice(),  # noqa: B008 (frozen)
    ) -> None:
        self.policy = policy
        self.log_reward = log_reward
        self.table = table
        self.mode = mode
        self.flow = flow
        self.frozen_guess = frozen_guess
        self.steps = steps
        self.modules = nn.ModuleDict({"flow": flow})

    def choose(self, num_steps: int, generator: torch.Generator) -> Tensor:
        return self.steps(num_steps, generator)

    def prepare(self, chosen: Selection) -> EndSignals:
        assert chosen.paths.reward is not None
        return EndSignals(self.log_reward.of(chosen.of_each(chosen.paths.reward)))

    def losses(self, batch: Transitions) -> Losses:
        k = self.table.at(batch.step, batch.x)
        with self.policy.reference(), torch.no_grad():
            output_ref = self.policy.output(batch.x, k.here.time, batch.condition)
        with torch.enable_grad():
            output = self.policy.output(batch.x, k.here.time, batch.condition)
            log_ratio = kernels.log_ratio(batch.x, batch.x_next, output, output_ref, k)
            log_ratio = log_ratio.flatten(1).sum(1)
            guessing = output_ref if self.frozen_guess else output.detach()
            here = self._guess(batch.x, guessing, k.here, batch.condition)
            here = here + self._flow(batch.x, k.here.time, batch.condition)
            residual = here + log_ratio - self.log_flow_next(batch, k)
        return Losses({"balance": residual.square()}, {"log_ratio": log_ratio.detach()})

    def log_flow_next(self, batch: Transitions, k: Step) -> Tensor:
        """log F̃(x_{k+1}), [M]: β·r where x_{k+1} is clean, which costs no evaluation."""
        assert isinstance(batch.signals, EndSignals)
        known = batch.signals.log_reward.to(batch.x.dtype)
        if not len(k.noisy):
            return known
        rows = beside(k.noisy, known)
        x, level = batch.x_next[rows], k.next[rows]
        where = batch.condition[k.noisy]
        model = self.policy.reference() if self.frozen_guess else nullcontext()
        with model, torch.no_grad():
            output = self.policy.output(x, level.time, where)
        value = self._guess(x, output, level, where) + self._flow(x, level.time, where)
        return known.index_put((rows,), value.to(known.dtype))

    def _guess(self, x: Tensor, output: Tensor, level: Level, condition: Condition) -> Tensor:
        """β·γ·r(decode(x̂)), a constant, [M]."""
        with torch.no_grad():
            value = self.log_reward(kernels.predict_clean(x, output, level), condition)
        return row_attenuation(level.alpha_bar, self.mode, value) * value

    def _flow(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """s_φ(x), [M]."""
        scalar: Tensor = self.flow(x, time, condition).flatten(1).sum(1)
        return scalar


def build(p: Parts) -> Objective:
    """The method dag-db."""
    return DagDB(
        p.policy,
        p.log_reward,
        p.table,
        p.config.model.reward_adaptive_mode,
        p.flow(),
        frozen_guess=p.frozen_guess(False),
        steps=p.steps,
    )
