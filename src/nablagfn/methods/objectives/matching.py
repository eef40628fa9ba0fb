"""The matching loss: the policy's residual score is fitted to an estimated value gradient.

    loss = ‖ w_k [∇ log P̃(x_{k+1}|x_k) − v̂(x_{k+1})] ‖² + λ ‖ε_θ − ε_θ†‖² + the estimator's own loss

(the forward condition of residual ∇-DB, Liu et al. 2025, with the estimator left open).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import kernels
from ...core.bellman import ReturnSignals
from ...core.kernels import KernelTable, Step
from ...core.rollout import StepChoice
from ...core.types import Losses, Objective, Policy, Selection, Signals, Transitions
from ...core.value_gradient import (
    Estimator,
    Evaluated,
    ReferenceSignals,
    StepWeight,
    mean_square,
    shortened,
    step_weight,
)


def residual_score(
    x: Tensor, x_next: Tensor, output: Tensor, output_ref: Tensor, k: Step, strength: float = 1.0
) -> Tensor:
    """∇_{x_{k+1}} [log p_θ − s·log p_#](x_{k+1}|x_k), [M, ...].

    With s = 1 both Gaussians share σ, so x_{k+1} cancels: (c2/σ²)(u_θ − u_#). Computing it so
    avoids the difference of two large scores.
    """
    shared = k.c2 / k.std**2 * (output - output_ref)
    if strength == 1.0:
        return shared
    return shared + (1 - strength) * kernels.score_next(x, x_next, output_ref, k)


class MatchingObjective(Objective):
    """Residual gradient matching with an exchangeable estimator of ∇ log F̃.

    strength: s, weight of log p_# (1 = the paper). trust: λ, weight of the trust region. weight:
    w_k. steps: which transitions of a trajectory are learned from. quantile: of the lengths of v̂
    that are known of a whole update, to which longer ones are shortened.
    """

    def __init__(
        self,
        policy: Policy,
        table: KernelTable,
        estimator: Estimator,
        *,
        strength: float = 1.0,
        trust: float = 0.0,
        weight: StepWeight = "one",
        steps: Callable[[int, torch.Generator], Tensor] | None = None,
        quantile: float = 1.0,
    ) -> None:
        self.policy = policy
        self.table = table
        self.estimator = estimator
        self.strength = strength
        self.trust = trust
        self.weight = weight
        self.steps = steps or StepChoice()
        self.quantile = quantile
        self.modules = estimator.modules

    def choose(self, num_steps: int, generator: torch.Generator) -> Tensor:
        return self.steps(num_steps, generator)

    def limit_rows(self, rows: int) -> None:
        self.estimator.limit_rows(rows)

    def prepare(self, chosen: Selection) -> Signals:
        signals = self.estimator.prepare(chosen)
        if self.quantile == 1 or not isinstance(signals, ReturnSignals):
            return signals
        v = signals.return_next
        assert v is not None
        std = self.table.at(chosen.step, v).std
        return replace(signals, return_next=shortened(v, std, self.quantile))

    def evaluate(self, batch: Transitions) -> Evaluated:
        """Both models at x_k; the frozen one unless it came as a signal, and without a graph unless
        the estimator needs it.
        """
        k = self.table.at(batch.step, batch.x)
        graph = self.estimator.needs_input_graph
        x = batch.x.detach().requires_grad_(graph)
        output_ref = None
        if isinstance(batch.signals, ReferenceSignals):
            output_ref = batch.signals.output_ref
        if output_ref is None:
            with self.policy.reference(), torch.set_grad_enabled(graph):
                output_ref = self.policy.output(x, k.here.time, batch.condition)
        ahead = self.estimator.ahead(batch, k, x, output_ref)
        with torch.enable_grad():
            output = self.policy.output(x, k.here.time, batch.condition)
        return Evaluated(batch=batch, k=k, x=x, output=output, output_ref=output_ref, ahead=ahead)

    def losses(self, batch: Transitions) -> Losses:
        """Forward loss, trust region and the estimator's own terms, each [M]."""
        here = self.evaluate(batch)
        estimate = self.estimator(here)
        score = residual_score(
            here.x.detach(),
            batch.x_next,
            here.output,
            here.output_ref.detach(),
            here.k,
            self.strength,
        )
        drift = mean_square(here.k.eps_slope * (here.output - batch.output_old))
        w = step_weight(here.k, self.weight)
        terms = {
            "forward": mean_square(w * (score - estimate.value_gradient)),
            "trust": self.trust * drift,
            **estimate.terms,
        }
        v = estimate.value_gradient.detach()
        metrics = {
            "residual_score_sq": mean_square(score).detach(),
            "cosine": F.cosine_similarity(score.detach().flatten(1), v.flatten(1)),
            **estimate.metrics,
        }
        return Losses(terms=terms, metrics=metrics, vectors={"value_gradient": v})
