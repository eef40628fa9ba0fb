"""`no_flow`: the forward-looking guess alone, v̂ = β·γ·∇r(x̂_θ(x_{k+1})) (Liu et al. 2025)."""

from __future__ import annotations

from torch import nn

from ..lookahead import Attenuation, LogReward, guess
from ..types import Policy
from ..value_gradient import Estimate, Evaluated, mean_square


class Guess:
    """Nothing learned beside the policy: cheapest in memory, biased at early steps."""

    needs_input_graph = False

    def __init__(self, policy: Policy, log_reward: LogReward, mode: Attenuation) -> None:
        self.policy = policy
        self.log_reward = log_reward
        self.mode = mode
        self.modules = nn.ModuleDict()

    def __call__(self, here: Evaluated) -> Estimate:
        """One reward gradient at x_{k+1}, detached."""
        batch = here.batch
        value = guess(
            self.log_reward, self.policy, batch.x_next, here.k, batch.condition, self.mode
        )
        return Estimate(value, metrics={"guess_sq": mean_square(value)})
