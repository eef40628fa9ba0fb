"""The terminal gradient (reward score matching, arXiv 2604.17415): v̂(x_{k+1}) = β∇r(x_N).

One reward gradient per path, no Jacobian: cheapest of all, and biased wherever x̂ depends on x_k
otherwise than as the identity.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core.lookahead import LogReward, terminal_gradient
from ...core.types import Objective, Selection
from ...core.value_gradient import Estimate, Estimator, Evaluated, mean_square
from ..parts import Parts


class TerminalGradient(Estimator):
    """chunk: paths per reward evaluation."""

    needs_input_graph = False

    def __init__(self, log_reward: LogReward, *, chunk: int) -> None:
        self.log_reward = log_reward
        self.chunk = chunk
        self.modules = nn.ModuleDict()

    def limit_rows(self, rows: int) -> None:
        self.chunk = rows

    def prepare(self, chosen: Selection) -> Mapping[str, Tensor]:
        """β∇r(x_N) of each transition's own path."""
        paths = chosen.paths
        ends = [
            terminal_gradient(self.log_reward, paths.clean[rows], paths.condition[rows])
            for rows in torch.arange(len(paths.condition)).split(self.chunk)
        ]
        return {"terminal_gradient": torch.cat(ends)[chosen.row]}

    def __call__(self, here: Evaluated) -> Estimate:
        gradient = here.batch.signals["terminal_gradient"]
        return Estimate(gradient, metrics={"terminal_gradient_sq": mean_square(gradient)})


def build(p: Parts) -> Objective:
    """The method terminal-gradient."""
    return p.matching(TerminalGradient(p.log_reward, chunk=p.chunk), p.weight("std"))
