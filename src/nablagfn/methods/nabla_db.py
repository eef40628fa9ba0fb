"""The method nabla-db, which has two estimators: with a flow network, and without."""

from __future__ import annotations

from ..config import ConfigError
from ..core.types import Objective
from .estimators.guess import Guess
from .estimators.residual_db import ResidualDB
from .parts import Parts


def build(p: Parts) -> Objective:
    """Residual ∇-DB; with `model.no_flow` the guess alone."""
    m = p.config.model
    if m.no_flow:
        guess = Guess(
            p.policy,
            p.log_reward,
            m.reward_adaptive_mode,
            frozen_guess=p.frozen_guess(False),
            how=p.how,
        )
        return p.matching(guess, p.weight("one"))
    if p.frozen_guess(False):
        raise ConfigError(
            "config.method.guess_model=pretrained is for nabla-db-lambda, or nabla-db with "
            "config.model.no_flow=True: the published reverse loss guesses with the finetuned model"
        )
    estimator = ResidualDB(
        p.policy,
        p.log_reward,
        m.reward_adaptive_mode,
        p.flow(),
        reverse_scale=m.reverse_loss_scale,
        strength=m.pretrained_strength,
        how=p.how,
    )
    return p.matching(estimator, p.weight("one"))
