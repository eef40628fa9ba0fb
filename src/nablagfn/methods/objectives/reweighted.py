"""Regression on the paths of a pool, weighted by their share of the target: nabla-db-pool and
reward-weighted.

In units of σ_k the policy moves the mean of a step by d, and x_N says of the step's noise z̄:

    d(x_k) = (c2/σ)(u_θ − u_#)(x_k),      z̄ = (E[x_{k+1}|x_k, x_N] − m_#(x_k))/σ

    loss = (ω_k/σ_k)² ( w‖d‖² − 2 d·t ),   t = (1 − γ_k)[ w ρ_k z̄ − c (ρ_k z̄ − d†) ] + γ_k w d̂

w: the path's weight in the target, exp(βr)·p_#/p_drawn; ρ_k: how much of z̄ the sampler's own steps
follow, measured on its paths (`kernels.bridge_slope`); d†: d of what drew the path, so that
ρ_k z̄ − d† has about mean 0 given x_k and may be taken off with any factor that does not depend on
x_N: c = 1. It takes the pretrained model's own errors out of the regression, and variance. Without
γ (the method reward-weighted) the minimiser is E[w ρ_k z̄|x_k]/E[w|x_k], the step of the target as
far as ρ_k z̄ stands for the step's noise, for any reward, and no gradient of it is needed. With
γ_k = ᾱ_k (nabla-db-pool) the steps near the clean end, where z̄ is almost noise alone and the reward
almost linear, take the shifted guess instead:

    d̂ = (b/σ)(s²/a)·[ E_#[x_N|x_k + h·β∇r(x_N)] − E_#[x_N|x_k] ]/h

with x_k = a·x_N + s·noise, b the share of x_N in E[x_{k+1}|x_k, x_N], h = s²/a or less, and ∇r at
the path's own end. Loss terms may be below 0: they leave out a constant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import kernels
from ...core.kernels import KernelTable, Step
from ...core.log_reward import LogReward
from ...core.lookahead import LEAST, Attenuation, attenuation, shifted
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
from ...core.value_gradient import StepWeight, mean_square, step_weight
from ..parts import Parts


@dataclass(frozen=True)
class PoolSignals(Signals):
    """Of each transition's path: x_end [M, ...] x_N, output_ref and output_old [M, ...] of u_# and
    of what drew it, where x_k is the path's own; known: [M] whether it is, on the CPU. weight,
    control: [M], and end: [M] the weight of the guess, which has ∇r(x_N), gradient [M, ...].

    slope: [M] ρ_k. Of judged steps there is none; noise and away are z_k and d† then, [M, ...],
    along the directions that count.
    """

    x_end: Tensor
    output_ref: Tensor
    known: Tensor
    weight: Tensor
    control: Tensor
    end: Tensor
    slope: Tensor | None = None
    noise: Tensor | None = None
    away: Tensor | None = None
    gradient: Tensor | None = None


@dataclass(frozen=True)
class Guessing:
    """The guess near the clean end. cap: of the shift, in units of the noise there."""

    log_reward: LogReward
    mode: Attenuation
    cap: float


class ReweightedRegression(Objective):
    """guessing: None for the weighted regression alone. fraction: of each path's steps."""

    def __init__(
        self,
        policy: Policy,
        table: KernelTable,
        *,
        weight: StepWeight,
        fraction: float,
        guessing: Guessing | None = None,
    ) -> None:
        self.policy = policy
        self.table = table
        self.weight = weight
        self.steps = SpreadChoice(fraction)
        self.guessing = guessing
        self.uses_reward_gradient = guessing is not None
        self.modules = nn.ModuleDict()

    def choose(self, num_steps: int, generator: torch.Generator) -> Tensor:
        return self.steps(num_steps, generator)

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
            known,
            weight,
            torch.where(drawn, 0.0, chosen.of_each(pooled.control)),  # d† is unknown there
            weight,
            pooled.slope[step],
            gradient=None if pooled.gradient is None else chosen.of_each(pooled.gradient),
        )
        if pooled.judged is None:
            return signals
        noise, away = self._of_steps(chosen, pooled.judged.directions)
        return replace(
            signals,
            weight=pooled.judged.then[row, step],
            control=pooled.judged.now[row, step],
            end=pooled.judged.end[row, step],
            slope=None,
            noise=noise,
            away=away,
        )

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
        noise, away = self.noise(batch, known, k)
        w, c = known.weight.reshape(k.std.shape), known.control.reshape(k.std.shape)
        seen = w * noise - c * (noise - away)
        if self.guessing is None:
            return seen
        trust = attenuation(k.here.alpha_bar, self.guessing.mode)
        end = known.end.reshape(k.std.shape)
        return (1 - trust) * seen + trust * end * self.guessed(batch, known, k, self.guessing)

    def noise(self, batch: Transitions, known: PoolSignals, k: Step) -> tuple[Tensor, Tensor]:
        """ρ_k z̄, or of a judged path the noise z_k that it had, and d† of the same, [M, ...]."""
        if known.slope is None:
            assert known.noise is not None and known.away is not None
            return known.noise, known.away
        seen = kernels.bridge_noise(batch.x, known.x_end, known.output_ref, k)
        slope = known.slope.to(seen.dtype).reshape(k.std.shape)
        return slope * seen, kernels.moved_mean(batch.output_old, known.output_ref, k)

    def guessed(self, batch: Transitions, known: PoolSignals, k: Step, how: Guessing) -> Tensor:
        """d̂, [M, ...], without a graph; 0 where a = 0."""
        assert known.gradient is not None
        slope = how.log_reward.of(known.gradient)
        x_clean = kernels.predict_clean(batch.x, known.output_ref, k.here)

        def change(shift: Tensor) -> Tensor:
            x = batch.x + shift
            with self.policy.reference():
                output = self.policy.output(x, k.here.time, batch.condition)
            return kernels.predict_clean(x, output, k.here) - x_clean

        found = shifted(slope, k.here, how.cap, change)
        a, s = k.here.end_scale, k.here.end_std
        whole = torch.where(a > 0, s.square() / a.clamp(min=LEAST), 0.0)
        return k.bridge_end / k.std * whole * found


def build_pool(p: Parts) -> Objective:
    """The method nabla-db-pool."""
    guessing = Guessing(
        p.log_reward, p.config.model.reward_adaptive_mode, p.config.method.shift_cap
    )
    return _build(p, guessing)


def build_reward_weighted(p: Parts) -> Objective:
    """The method reward-weighted."""
    return _build(p, None)


def _build(p: Parts, guessing: Guessing | None) -> Objective:
    return ReweightedRegression(
        p.policy,
        p.table,
        weight=p.weight("std"),
        fraction=p.config.model.timestep_fraction,
        guessing=guessing,
    )
