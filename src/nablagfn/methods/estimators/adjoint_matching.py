"""Adjoint Matching (Domingo-Enrich et al. 2025, arXiv 2409.08861): v̂ is the lean adjoint.

    a_N = β∇r(x_N),   a_k = J_{m_#}(x_k)ᵀ a_{k+1},   v̂(x_{k+1}) = a_{k+1}

The sign is that of the reward here (the paper's adjoint is the gradient of a cost). Nothing is
learned beside the policy; each path costs a forward and a backward pass of the frozen model per
step. Weighted by σ_k the loss is the paper's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.bellman import Returns, ReturnSignals, adjoint, returns, sweep
from ...core.kernels import KernelTable
from ...core.log_reward import LogReward, terminal_gradient
from ...core.types import Condition, Objective, Policy, Selection
from ...core.value_gradient import Estimate, Estimator, Evaluated, mean_square
from ..parts import Parts


class AdjointMatching(Estimator):
    """chunk: paths per backward sweep (memory and speed, not results)."""

    needs_input_graph = False

    def __init__(
        self, policy: Policy, log_reward: LogReward, table: KernelTable, *, chunk: int
    ) -> None:
        self.policy = policy
        self.log_reward = log_reward
        self.table = table
        self.chunk = chunk
        self.modules = nn.ModuleDict()

    def limit_rows(self, rows: int) -> None:
        self.chunk = rows

    def prepare(self, chosen: Selection) -> ReturnSignals:
        """a_{k+1} and u_#(x_k) of every chosen transition."""
        start = int(chosen.step.min())
        first = torch.full((len(chosen.paths.condition),), start)

        def adjoints(x: Tensor, first: Tensor, condition: Condition) -> Returns:
            end = terminal_gradient(self.log_reward, x[:, -1], condition)
            return returns(self.policy, self.table, x, first, condition, end, adjoint)

        return sweep(chosen, first, self.table.num_steps - start, self.chunk, adjoints)

    def __call__(self, here: Evaluated) -> Estimate:
        assert isinstance(here.batch.signals, ReturnSignals)
        v = here.batch.signals.return_next
        assert v is not None
        return Estimate(v, metrics={"adjoint_sq": mean_square(v)})


def build(p: Parts) -> Objective:
    """The method adjoint-matching."""
    estimator = AdjointMatching(p.policy, p.log_reward, p.table, chunk=p.chunk)
    return p.matching(estimator, p.weight("std"))
