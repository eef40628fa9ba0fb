"""Residual ∇-DB as published (Liu et al. 2025): guess plus a flow network g_φ, which is trained by
the reverse and the terminal condition.

    v̂(x_{k+1}) = β·γ·∇r(x̂_θ(x_{k+1})) + g_φ(x_{k+1})
    reverse:   ∇_{x_k} log P̃(x_{k+1}|x_k) + β·γ·∇r(x̂_θ(x_k)) + g_φ(x_k) = 0
    terminal:  g_φ(x_N) = 0

The first two terms of the reverse condition are vector-Jacobian products, detached: they give θ
no gradient. The guess may be of another kind (`lookahead`); g_φ then learns what that one misses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core import kernels
from ...core.log_reward import LogReward
from ...core.lookahead import GRADIENT, Attenuation, How, guess, guess_here, row_attenuation
from ...core.types import Policy, Transitions
from ...core.value_gradient import Ahead, Estimate, Estimator, Evaluated, mean_square


def reverse_score(x: Tensor, x_next: Tensor, output: Tensor, k: kernels.Step) -> Tensor:
    """∇_{x_k} log p(x_{k+1}|x_k) = J_m(x_k)ᵀ(x_{k+1} − m)/σ², detached, [M, ...].

    `eps` must carry its graph from `x`; the graph is freed. One vector-Jacobian product.
    """
    m = kernels.mean(x, output, k)
    (score,) = torch.autograd.grad(m, x, reverse_cotangent(x_next, m, k))
    return score


def reverse_cotangent(x_next: Tensor, m: Tensor, k: kernels.Step) -> Tensor:
    """∂ log p(x_{k+1}|x_k) / ∂m = (x_{k+1} − m)/σ², detached, [M, ...]."""
    return ((x_next - m) / k.std**2).detach()


@dataclass(frozen=True)
class ResidualAhead(Ahead):
    """guess: [M, ...] at x_{k+1}. score_ref: [M, ...] the frozen model's reverse score; None
    without the reverse condition."""

    guess: Tensor
    score_ref: Tensor | None


class ResidualDB(Estimator):
    """The paper's estimator. reverse_scale: w_B, at 0 the reverse condition is not evaluated;
    strength: s multiplies log p_# only. how: the guess is made.
    """

    def __init__(
        self,
        policy: Policy,
        log_reward: LogReward,
        mode: Attenuation,
        flow: nn.Module,
        *,
        reverse_scale: float = 1.0,
        strength: float = 1.0,
        how: How = GRADIENT,
    ) -> None:
        self.policy = policy
        self.log_reward = log_reward
        self.mode = mode
        self.flow = flow
        self.reverse_scale = reverse_scale
        self.strength = strength
        self.how = how
        self.needs_input_graph = reverse_scale > 0
        self.modules = nn.ModuleDict({"flow": flow})

    def ahead(
        self, batch: Transitions, k: kernels.Step, x: Tensor, output_ref: Tensor
    ) -> ResidualAhead:
        """The frozen model's reverse score, which frees its graph, then the guess at x_{k+1}."""
        score_ref = None
        if self.needs_input_graph:
            with self.policy.reference():
                score_ref = reverse_score(x, batch.x_next, output_ref, k)
        guessed = guess(
            self.log_reward, self.policy, batch.x_next, k, batch.condition, self.mode, self.how
        )
        return ResidualAhead(guessed.gradient, score_ref)

    def __call__(self, here: Evaluated) -> Estimate:
        """v̂ with the flow's own reverse and terminal losses."""
        assert isinstance(here.ahead, ResidualAhead)
        batch, k, known = here.batch, here.k, here.ahead.guess
        learned = self.flow(batch.x_next, k.next.time, batch.condition)
        return Estimate(
            value_gradient=known + learned,
            terms={
                "reverse": self._reverse(here),
                "terminal": k.last.to(learned.dtype) * mean_square(learned),
            },
            metrics={
                "guess_sq": mean_square(known),
                "flow_sq": mean_square(learned.detach()),
            },
        )

    def _reverse(self, here: Evaluated) -> Tensor:
        """w_B·‖reverse condition‖², [M]."""
        batch = here.batch
        if not self.needs_input_graph:
            return torch.zeros(len(batch), dtype=batch.x.dtype, device=batch.x.device)
        value = self.flow(batch.x, here.k.here.time, batch.condition)
        return self.reverse_scale * mean_square(self.reverse_target(here) + value)

    def reverse_target(self, here: Evaluated) -> Tensor:
        """∇_{x_k}[log p_θ − s·log p_#](x_{k+1}|x_k) + β·γ·∇r(x̂_θ(x_k)), detached, [M, ...].

        The score of θ and a guess by gradient share ε_θ(x_k): one backward pass with the summed
        cotangent serves both.
        """
        batch, k = here.batch, here.k
        assert isinstance(here.ahead, ResidualAhead) and here.ahead.score_ref is not None
        m = kernels.mean(here.x, here.output, k)
        x_clean = kernels.predict_clean(here.x, here.output, k.here)
        outputs, cotangents = [m], [reverse_cotangent(batch.x_next, m, k)]
        if self.how.kind == "gradient":
            value = self.log_reward(x_clean, batch.condition)
            outputs.append(value)
            cotangents.append(row_attenuation(k.here.alpha_bar, self.mode, value))
        (found,) = torch.autograd.grad(outputs, here.x, cotangents, retain_graph=True)
        if self.how.kind != "gradient":
            found = found + guess_here(
                self.log_reward,
                self.policy,
                here.x,
                x_clean,
                k,
                batch.condition,
                self.mode,
                self.how,
            )
        return found - self.strength * here.ahead.score_ref
