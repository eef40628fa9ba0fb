"""∇-DB(λ): the flow network is fitted to the λ-return of value gradients (docs/nabla_db_lambda.md).

    V(x_k) = β·γ_k·∇r(x̂(x_k)) + g_φ(x_k),   V(x_N) = β∇r(x_N)
    v̂(x_{k+1}) = v_{k+1} = (1−λ)·V(x_{k+1}) + λ·G_{k+1}
    own loss: ‖ w_k [ V(x_k) − G_k ] ‖²,      G_k = J_{m_#}(x_k)ᵀ v_{k+1}, detached

v̂ is detached: θ is fitted to it by the matching loss, φ by its own loss only. λ = 0 needs the
chosen transitions alone. λ > 0 sweeps the rest of each path; or, with `window`, only the chosen
transitions, which are then neighbours, and V ends the return where the window ends.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core import kernels
from ...core.bellman import Backed, Pass, Returns, ReturnSignals, adjoint, returns, sweep
from ...core.kernels import KernelTable, Step
from ...core.log_reward import LogReward, terminal_gradient
from ...core.lookahead import (
    GRADIENT,
    Attenuation,
    How,
    attenuation,
    guess,
    guess_here,
    of_slope,
    row_attenuation,
)
from ...core.rollout import WindowChoice
from ...core.types import NO_SIGNALS, Condition, Objective, Policy, Selection, Signals, Transitions
from ...core.value_gradient import (
    NOTHING_AHEAD,
    Ahead,
    Estimate,
    Estimator,
    Evaluated,
    StepWeight,
    mean_square,
    step_weight,
)
from ..parts import Parts
from ..registry import find_method


@dataclass(frozen=True)
class ReturnAhead(Ahead):
    """return_next: [M, ...] v̂(x_{k+1}). return_rest: [M, ...] g_φ's target, where it is known."""

    return_next: Tensor
    return_rest: Tensor | None = None


class NablaDBLambda(Estimator):
    """flow: g_φ, or None for the guess alone (λ = 1 over whole paths has no use for it). hint: g_φ
    also sees the guess's x̂(x), which is at hand.

    frozen_guess: x̂ of the pretrained model (the guess and the Bellman target at x_k then pass
    through the same ε_#) or of the finetuned one. window: transitions are chosen as a window.
    how: the guess is made. mirror: without a sweep v̂ is the mean of V at x_{k+1} and at its mirror
    image. chunk: paths per sweep.
    """

    def __init__(
        self,
        policy: Policy,
        log_reward: LogReward,
        table: KernelTable,
        mode: Attenuation,
        flow: nn.Module | None,
        *,
        lam: float,
        weight: StepWeight,
        frozen_guess: bool,
        window: bool = False,
        hint: bool = False,
        how: How = GRADIENT,
        mirror: bool = False,
        chunk: int,
    ) -> None:
        self.how = how
        self.policy = policy
        self.log_reward = log_reward
        self.table = table
        self.mode = mode
        self.flow = flow
        self.lam = lam
        self.weight = weight
        self.frozen_guess = frozen_guess
        self.sweeps = window or lam > 0
        self.window = window
        self.hint = hint
        self.mirror = mirror
        self.chunk = chunk
        self.needs_input_graph = flow is not None and not self.sweeps
        self.modules = nn.ModuleDict({} if flow is None else {"flow": flow})

    def limit_rows(self, rows: int) -> None:
        self.chunk = rows

    def prepare(self, chosen: Selection) -> Signals:
        """v_{k+1}, g_φ's target and u_#(x_k) of the chosen transitions; nothing without sweep."""
        if not self.sweeps:
            return NO_SIGNALS
        count = len(chosen.paths.condition)
        if self.window:
            steps = chosen.step.reshape(count, -1)
            first, length = steps[:, 0], steps.shape[1]
        else:
            start = int(chosen.step.min())
            first, length = torch.full((count,), start), self.table.num_steps - start
        return sweep(chosen, first, length, self.chunk, self.returns)

    def returns(self, x: Tensor, first: Tensor, condition: Condition) -> Returns:
        """The λ-return over a stretch of paths that ends in V: β∇r(x_N) at the clean end."""
        into_end = self.table.at(first + x.shape[1] - 2, x[:, -1])
        end = self.value(x[:, -1], into_end, condition)
        needs_v = self.flow is not None or self.lam < 1
        backup = self.backup if needs_v else adjoint
        return returns(self.policy, self.table, x, first, condition, end, backup)

    def backup(self, here: Pass, v_next: Tensor, at_start: bool) -> Backed:
        """v_k and g_φ's target from v_{k+1}; the frozen guess needs no pass of its own.

        The guess and G_k each take a backward pass; where only their difference counts, one does.
        """
        if at_start and self.flow is None:
            return Backed()
        guessing = here
        if not self.frozen_guess:
            guessing = Pass.at(self.policy, here.x, here.k, here.condition, frozen=False)
        x_clean = guessing.x_clean()
        slope = terminal_gradient(self.log_reward, x_clean, here.condition)
        gamma = attenuation(here.k.here.alpha_bar, self.mode)
        if at_start and self.frozen_guess and self.how.kind == "gradient":
            return Backed(rest=here.product([here.mean(), x_clean], [v_next, -gamma * slope]))
        known = self._known(guessing, x_clean, slope, gamma)
        back = here.pull_back(v_next)
        value = known + self._learned(here.x, here.k.here.time, here.condition, x_clean)
        return Backed(mixed=(1 - self.lam) * value + self.lam * back, rest=back - known)

    def _known(self, here: Pass, x_clean: Tensor, slope: Tensor, gamma: Tensor) -> Tensor:
        """The guess at x_k, [B, ...], detached; slope: β∇r(x̂)."""
        if self.how.kind == "gradient":
            return here.product([x_clean], [gamma * slope])

        def change(shift: Tensor) -> Tensor:
            there = Pass.at(self.policy, here.x + shift, here.k, here.condition, frozen=here.frozen)
            return there.x_clean().detach() - x_clean.detach()

        return of_slope(slope, here.k.here, self.mode, self.how, change)

    def ahead(self, batch: Transitions, k: Step, x: Tensor, output_ref: Tensor) -> Ahead:
        """Without a sweep v̂(x_{k+1}), and g_φ's target where it needs no ε_θ(x_k)."""
        if self.sweeps:
            return NOTHING_AHEAD
        v = self.value(batch.x_next, k, batch.condition)
        if self.mirror:
            v = (v + self.value(mirrored(batch, k), k, batch.condition)) / 2
        if self.flow is None or not self.frozen_guess:
            return ReturnAhead(v)
        return ReturnAhead(v, self._frozen_target(batch, k, x, output_ref, v))

    def __call__(self, here: Evaluated) -> Estimate:
        """v̂(x_{k+1}), and the flow's own loss at x_k."""
        batch = here.batch
        known = batch.signals if self.sweeps else here.ahead
        assert isinstance(known, (ReturnSignals, ReturnAhead))
        v = known.return_next
        assert v is not None
        metrics = {"value_gradient_sq": mean_square(v)}
        if self.flow is None:
            return Estimate(v, metrics=metrics)
        target = self._target(here, v) if known.return_rest is None else known.return_rest
        hint = (self._x_clean(here).detach(),) if self.hint else ()
        learned = self.flow(batch.x, here.k.here.time, batch.condition, *hint)
        error = step_weight(here.k, self.weight) * (learned - target)
        metrics["flow_sq"] = mean_square(learned.detach())
        return Estimate(v, terms={"bellman": mean_square(error)}, metrics=metrics)

    def value(self, x_next: Tensor, k: Step, condition: Condition) -> Tensor:
        """V(x_{k+1}), detached, [M, ...]; exact at the clean end."""
        with self.policy.reference() if self.frozen_guess else nullcontext():
            known = guess(self.log_reward, self.policy, x_next, k, condition, self.mode, self.how)
        learned = self._learned(x_next, k.next.time, condition, known.x_clean)
        return known.gradient + torch.where(_rows(k.last, learned), 0.0, learned)

    def _frozen_target(
        self, batch: Transitions, k: Step, x: Tensor, output_ref: Tensor, v: Tensor
    ) -> Tensor:
        """G_k − β·γ_k·∇r(x̂_#(x_k)), detached, [M, ...]; frees the graph of ε_#(x_k).

        Both terms of a guess by gradient pass through it: one backward pass with both cotangents.
        """
        with torch.enable_grad():
            x_clean = kernels.predict_clean(x, output_ref, k.here)
            m = kernels.mean(x, output_ref, k)
        if self.how.kind != "gradient":
            with self.policy.reference():
                known = self._guess_here(x, x_clean, k, batch.condition)
                (back,) = torch.autograd.grad(m, x, v)
            return back - known
        with torch.enable_grad():
            value = self.log_reward(x_clean, batch.condition)
        with self.policy.reference():
            (rest,) = torch.autograd.grad(
                (m, value), x, (v, -row_attenuation(k.here.alpha_bar, self.mode, value))
            )
        return rest

    def _target(self, here: Evaluated, v: Tensor) -> Tensor:
        """The same with the finetuned model's guess at x_k."""
        known = self._tuned_guess(here)
        with torch.enable_grad():
            m = kernels.mean(here.x, here.output_ref, here.k)
        with self.policy.reference():
            (back,) = torch.autograd.grad(m, here.x, v)
        return back - known

    def _tuned_guess(self, here: Evaluated) -> Tensor:
        """The finetuned model's guess at x_k, detached, [M, ...]; its graph is kept for θ."""
        if self.how.kind != "gradient":
            return self._guess_here(here.x, self._x_clean(here), here.k, here.batch.condition)
        with torch.enable_grad():
            value = self.log_reward(self._x_clean(here), here.batch.condition)
        gamma = row_attenuation(here.k.here.alpha_bar, self.mode, value)
        (known,) = torch.autograd.grad(value, here.x, gamma, retain_graph=True)
        return known

    def _guess_here(self, x: Tensor, x_clean: Tensor, k: Step, condition: Condition) -> Tensor:
        return guess_here(
            self.log_reward, self.policy, x, x_clean, k, condition, self.mode, self.how
        )

    def _learned(self, x: Tensor, time: Tensor, condition: Condition, x_clean: Tensor) -> Tensor:
        """g_φ, detached, [M, ...]; zero without one."""
        if self.flow is None:
            return torch.zeros_like(x)
        hint = (x_clean.detach(),) if self.hint else ()
        with torch.no_grad():
            return self.flow(x, time, condition, *hint)

    def _x_clean(self, here: Evaluated) -> Tensor:
        """x̂(x_k) of the model that guesses, [M, ...]."""
        output = here.output_ref if self.frozen_guess else here.output
        return kernels.predict_clean(here.x, output, here.k.here)


def mirrored(batch: Transitions, k: Step) -> Tensor:
    """2m_θ†(x_k) − x_{k+1}, [M, ...]: where the step had ended with the opposite noise."""
    return 2 * kernels.mean(batch.x, batch.output_old, k) - batch.x_next


def _rows(flags: Tensor, like: Tensor) -> Tensor:
    """[M] booleans shaped to broadcast against `like` [M, ...]."""
    return flags.reshape(-1, *([1] * (like.ndim - 1)))


def build(p: Parts) -> Objective:
    """The method nabla-db-lambda."""
    m, weight = p.config.method, p.weight("std")
    learns = find_method("nabla-db-lambda").learns_flow(p.config)
    estimator = NablaDBLambda(
        p.policy,
        p.log_reward,
        p.table,
        p.config.model.reward_adaptive_mode,
        p.flow(m.flow_hint) if learns else None,
        hint=m.flow_hint,
        lam=m.return_lambda,
        weight=weight,
        frozen_guess=p.frozen_guess(True),
        window=m.window > 0,
        how=p.how,
        mirror=m.mirror,
        chunk=p.chunk,
    )
    return p.matching(estimator, weight, WindowChoice(m.window) if m.window else None)
