"""The terminal gradient (reward score matching, arXiv 2604.17415): v̂(x_{k+1}) = β∇r(x_N).

One reward gradient per path, no Jacobian: cheapest of all, and biased wherever x̂ depends on x_k
otherwise than as the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.log_reward import LogReward, terminal_gradient
from ...core.types import Objective, Selection, Signals, beside
from ...core.value_gradient import Estimate, Estimator, Evaluated, mean_square
from ..parts import Parts


@dataclass(frozen=True)
class EndGradient(Signals):
    """gradient: [M, ...] β∇r(x_N) of each transition's own path."""

    gradient: Tensor


class TerminalGradient(Estimator):
    """chunk: paths per reward evaluation."""

    needs_input_graph = False

    def __init__(self, log_reward: LogReward, *, chunk: int) -> None:
        self.log_reward = log_reward
        self.chunk = chunk
        self.modules = nn.ModuleDict()

    def limit_rows(self, rows: int) -> None:
        self.chunk = rows

    def prepare(self, chosen: Selection) -> EndGradient:
        paths = chosen.paths
        ends = [
            terminal_gradient(
                self.log_reward, paths.clean[beside(rows, paths.clean)], paths.condition[rows]
            )
            for rows in torch.arange(len(paths.condition)).split(self.chunk)
        ]
        return EndGradient(chosen.of_each(torch.cat(ends)))

    def __call__(self, here: Evaluated) -> Estimate:
        assert isinstance(here.batch.signals, EndGradient)
        gradient = here.batch.signals.gradient
        return Estimate(gradient, metrics={"terminal_gradient_sq": mean_square(gradient)})


def build(p: Parts) -> Objective:
    """The method terminal-gradient."""
    return p.matching(TerminalGradient(p.log_reward, chunk=p.chunk), p.weight("std"))
