"""Regression on the paths of a pool, weighted by their share of the target: nabla-db-pool and
reward-weighted.

In units of σ_k the policy moves the mean of a step by d:

    d(x_k) = (c2/σ)(u_θ − u_#)(x_k),      loss = (ω_k/σ_k)² ( w‖d‖² − 2 d·t )

w: the path's weight in the target, exp(βr)·p_#/p_drawn. The minimiser is E[t|x_k]/E[w|x_k], and the
target's own step is d*(x_k) = σ_k E[∇h(x_{k+1})|x_k]/h(x_k), h = E[w|x]. There are two ways to it.

nabla-db-pool differentiates along the path. What the weight does when x_{k+1} is moved, with the
noise of all later steps as it was, is the reward's gradient carried back through the frozen model:

    t = w·cap(σ_k λ_{k+1}),      λ_N = β∇r(x_N),      λ_k = J_{m_#}(x_k)ᵀ λ_{k+1}

(the lean adjoint of Domingo-Enrich et al. 2025, arXiv 2409.08861, whose loss this is for w = 1).
cap shortens what is longer than so many standard deviations of the step: a path that crosses from
one mode to another has a gradient a hundred times as long as others.

reward-weighted asks the noise, and needs no gradient of the reward. x_N says of the step's noise

    z̄ = (E[x_{k+1}|x_k, x_N] − m_#(x_k))/σ,      t = w ρ_k z̄ − c (ρ_k z̄ − d†),      c = 1

ρ_k: how much of z̄ the sampler's own steps follow, measured on its paths (`kernels.bridge_slope`);
d†: d of what drew the path, so that ρ_k z̄ − d† has about mean 0 given x_k and may be taken off with
any factor that does not depend on x_N. It takes the pretrained model's own errors out of the
regression, and variance. A judged step has its own noise z_k and expected weights in place of ρ_k z̄
and w (`training.critic`). Loss terms may be below 0: they leave out a constant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import kernels
from ...core.kernels import KernelTable, Step
from ...core.log_reward import LogReward
from ...core.rollout import SpreadChoice
from ...core.types import (
    Losses,
    Objective,
    Policy,
    Selection,
    Signals,
    Transitions,
    beside,
)
from ...core.value_gradient import StepWeight, mean_square, no_longer, step_weight
from ..parts import Parts


@dataclass(frozen=True)
class PoolSignals(Signals):
    """Of each transition's path: x_end [M, ...] x_N, output_ref and output_old [M, ...] of u_# and
    of what drew it, where x_k is the path's own; known: [M] whether it is, on the CPU, None: all
    are. weight, control: [M], and end: [M] the weight of the carried gradient λ_{k+1} for β = 1,
    gradient [M, ...].

    slope: [M] ρ_k. Of judged steps there is none; noise and away are z_k and d† then, [M, ...],
    along the directions that count.
    """

    x_end: Tensor
    output_ref: Tensor
    known: Tensor | None
    weight: Tensor
    control: Tensor
    end: Tensor
    slope: Tensor | None = None
    noise: Tensor | None = None
    away: Tensor | None = None
    gradient: Tensor | None = None


@dataclass(frozen=True)
class Carrying:
    """How the gradient that is carried along a path is used. share: of it in what is aimed at, the
    rest being what the noise says. cap: its length at most, in σ_k; 0: any."""

    log_reward: LogReward
    share: float
    cap: float

    def aim(self, gradient: Tensor, k: Step) -> Tensor:
        """cap(σ_k βλ_{k+1}), [M, ...], from λ_{k+1} [M, ...] for β = 1."""
        found = k.std * self.log_reward.of(gradient)
        if not self.cap:
            return found
        length = found.flatten(1).norm(dim=1)
        return no_longer(found, length, length.new_full((), self.cap))


class ReweightedRegression(Objective):
    """carrying: None for what the noise says alone. fraction: of each path's steps, among the
    first `acting` (None: all). of_reward: whether what is carried is the reward's own gradient."""

    def __init__(
        self,
        policy: Policy,
        table: KernelTable,
        *,
        weight: StepWeight,
        fraction: float,
        acting: int | None = None,
        carrying: Carrying | None = None,
        of_reward: bool = True,
    ) -> None:
        self.policy = policy
        self.table = table
        self.weight = weight
        self.steps = SpreadChoice(fraction)
        self.carrying = carrying
        self.acting = table.num_steps if acting is None else acting
        self.carries_gradient = carrying is not None
        self.uses_reward_gradient = self.carries_gradient and of_reward
        self.modules = nn.ModuleDict()

    def choose(self, num_steps: int, generator: torch.Generator) -> Tensor:
        return self.steps(self.acting, generator)

    def prepare(self, chosen: Selection) -> PoolSignals:
        """What the pool knows of each transition's path."""
        paths, pooled = chosen.paths, chosen.paths.pooled
        assert pooled is not None, "the config's check asks for a pool"
        row = chosen.row.to(paths.x.device, non_blocking=True)
        step = chosen.step.to(paths.x.device, non_blocking=True)
        known = chosen.step >= pooled.fresh
        drawn = chosen.of_each(pooled.own) & ~known.to(paths.x.device, non_blocking=True)
        weight = chosen.of_each(pooled.weight)
        signals = PoolSignals(
            chosen.of_each(paths.clean),
            pooled.output_ref[row, step],
            known if pooled.fresh else None,
            weight,
            torch.where(drawn, 0.0, chosen.of_each(pooled.control)),  # d† is unknown there
            weight,
            pooled.slope[step],
            gradient=None if pooled.gradient is None else pooled.gradient[row, step],
        )
        if pooled.judged is None:
            return signals
        signals = replace(
            signals,
            weight=pooled.judged.then[row, step],
            control=pooled.judged.now[row, step],
            end=pooled.judged.end[row, step],
            slope=None,
        )
        if self.carrying and self.carrying.share == 1:  # the noise is not asked
            return signals
        noise, away = self._of_steps(chosen, pooled.judged.directions)
        return replace(signals, noise=noise, away=away)

    def _of_steps(self, chosen: Selection, directions: Tensor | None) -> tuple[Tensor, Tensor]:
        """z_k and d† of each transition, [M, ...], along the directions of its step."""
        paths, pooled = chosen.paths, chosen.paths.pooled
        assert pooled is not None
        noise = paths.x.new_empty(len(chosen.step), *paths.x.shape[2:])
        away = torch.empty_like(noise)
        for number in chosen.step.unique().tolist():
            of_it = (chosen.step == number).nonzero()[:, 0]
            rows = beside(chosen.row[of_it], paths.x)
            x, ref = paths.x[rows, number], pooled.output_ref[rows, number]
            k = self.table.at_step(number, x)
            found = kernels.step_noise(x, paths.x[rows, number + 1], ref, k)
            moved = kernels.moved_mean(paths.output[rows, number], ref, k)
            if directions is not None:
                found, moved = (kernels.along(v, directions[number]) for v in (found, moved))
            here = beside(of_it, noise)
            noise[here], away[here] = found, moved
        return noise, away

    def losses(self, batch: Transitions) -> Losses:
        known = batch.signals
        assert isinstance(known, PoolSignals)
        k = self.table.at(batch.step, batch.x)
        batch, known = self._completed(batch, known, k)
        aimed = self.aimed(batch, known, k)
        with torch.enable_grad():
            output = self.policy.output(batch.x, k.here.time, batch.condition)
        moved = kernels.moved_mean(output, known.output_ref, k)
        relative = step_weight(k, self.weight) / k.std
        w = known.weight.reshape(k.std.shape)
        value = relative.square() * (w * moved.square() - 2 * moved * aimed)
        return Losses(
            terms={"forward": value.flatten(1).mean(1)},
            metrics={
                "residual_score_sq": mean_square(moved / k.std).detach(),
                "cosine": F.cosine_similarity(moved.detach().flatten(1), aimed.flatten(1)),
                "path_weight": known.weight,
            },
            vectors={"value_gradient": aimed / k.std},
        )

    def _completed(
        self, batch: Transitions, known: PoolSignals, k: Step
    ) -> tuple[Transitions, PoolSignals]:
        """With u_#(x_k) of the states that are new, which also stands for what drew them."""
        if known.known is None:
            return batch, known
        rows = (~known.known).nonzero()[:, 0]
        if self.policy.together:  # every process makes the same passes
            rows = torch.arange(len(batch))
        if not len(rows):
            return batch, known
        here = beside(rows, batch.x)
        with self.policy.reference(), torch.no_grad():
            output = self.policy.output(batch.x[here], k.here.time[here], batch.condition[rows])
        ref = known.output_ref.index_put((here,), output.to(known.output_ref.dtype))
        there = beside(known.known, batch.x).reshape(k.std.shape)
        return (
            replace(batch, output_old=torch.where(there, batch.output_old, ref)),
            replace(known, output_ref=ref),
        )

    def aimed(self, batch: Transitions, known: PoolSignals, k: Step) -> Tensor:
        """t, [M, ...], without a graph."""
        share = self.carrying.share if self.carrying else 0.0
        found = torch.zeros_like(batch.x)
        if share < 1:
            noise, away = self.noise(batch, known, k)
            w, c = known.weight.reshape(k.std.shape), known.control.reshape(k.std.shape)
            found = (1 - share) * (w * noise - c * (noise - away))
        if self.carrying and share:
            assert known.gradient is not None
            end = known.end.reshape(k.std.shape)
            found = found + share * end * self.carrying.aim(known.gradient, k)
        return found

    def noise(self, batch: Transitions, known: PoolSignals, k: Step) -> tuple[Tensor, Tensor]:
        """ρ_k z̄, or of a judged path the noise z_k that it had, and d† of the same, [M, ...]."""
        if known.slope is None:
            assert known.noise is not None and known.away is not None
            return known.noise, known.away
        seen = kernels.bridge_noise(batch.x, known.x_end, known.output_ref, k)
        slope = known.slope.to(seen.dtype).reshape(k.std.shape)
        return slope * seen, kernels.moved_mean(batch.output_old, known.output_ref, k)


def build_pool(p: Parts) -> Objective:
    """The method nabla-db-pool."""
    s = p.config.pool
    carrying = Carrying(p.log_reward, s.gradient_share, s.gradient_cap)
    return _build(p, carrying if s.gradient_share else None)


def build_reward_weighted(p: Parts) -> Objective:
    """The method reward-weighted."""
    return _build(p, None)


def _build(p: Parts, carrying: Carrying | None) -> Objective:
    return ReweightedRegression(
        p.policy,
        p.table,
        weight=p.weight("std"),
        fraction=p.config.model.timestep_fraction,
        acting=p.table.steps_until(p.config.model.lora_until),
        carrying=carrying,
        of_reward=p.config.pool.gradient == "carried",
    )
