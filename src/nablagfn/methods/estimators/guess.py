"""`no_flow`: the forward-looking guess alone, v̂ = β·γ·∇r(x̂_θ(x_{k+1})) (Liu et al. 2025)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from ...core.kernels import Step
from ...core.log_reward import LogReward
from ...core.lookahead import GRADIENT, Attenuation, How, guess
from ...core.types import Policy, Transitions
from ...core.value_gradient import Ahead, Estimate, Estimator, Evaluated, mean_square


@dataclass(frozen=True)
class GuessAhead(Ahead):
    """guess: [M, ...] at x_{k+1}."""

    guess: Tensor


class Guess(Estimator):
    """Nothing learned beside the policy: cheapest in memory, biased at early steps.

    frozen_guess: x̂ of the pretrained model instead of the finetuned one. how: the guess is made.
    """

    needs_input_graph = False

    def __init__(
        self,
        policy: Policy,
        log_reward: LogReward,
        mode: Attenuation,
        *,
        frozen_guess: bool = False,
        how: How = GRADIENT,
    ) -> None:
        self.policy = policy
        self.log_reward = log_reward
        self.mode = mode
        self.frozen_guess = frozen_guess
        self.how = how
        self.modules = nn.ModuleDict()

    def ahead(self, batch: Transitions, k: Step, x: Tensor, output_ref: Tensor) -> GuessAhead:
        """One reward gradient at x_{k+1}."""
        with self.policy.reference() if self.frozen_guess else nullcontext():
            found = guess(
                self.log_reward,
                self.policy,
                batch.x_next,
                k,
                batch.condition,
                self.mode,
                self.how,
            )
        return GuessAhead(found.gradient)

    def __call__(self, here: Evaluated) -> Estimate:
        assert isinstance(here.ahead, GuessAhead)
        value = here.ahead.guess
        return Estimate(value, metrics={"guess_sq": mean_square(value)})
