"""Which parts make a method: the only code that knows every objective and estimator by name."""

from __future__ import annotations

from collections.abc import Callable

from . import kernels
from .config import Config, ConfigError
from .estimators.guess import Guess
from .estimators.residual_db import ResidualDB
from .kernels import KernelTable
from .lookahead import LogReward
from .objectives.matching import MatchingObjective
from .rewards import require_gradient
from .types import Objective, Policy, Reward
from .value_gradient import Estimator


def build_kernel(config: Config, policy: Policy) -> KernelTable:
    """The sampler's table. Raises ConfigError when the settings give a step without noise."""
    s = config.sampling
    timesteps = policy.timesteps(s.scheduler, s.num_steps)
    try:
        if s.scheduler == "dpm-solver":
            return kernels.sde_dpm_solver(policy.alphas_cumprod, timesteps)
        return kernels.ddim(
            policy.alphas_cumprod, timesteps, s.eta if s.scheduler == "ddim" else 1.0
        )
    except ValueError as error:
        raise ConfigError(f"config.sampling.num_steps={s.num_steps}: {error}") from None


def build_objective(
    config: Config, policy: Policy, reward: Reward, table: KernelTable
) -> Objective:
    """The objective of `experiment.method`."""
    return METHODS[config.experiment.method](config, policy, reward, table)


def _nabla_db(config: Config, policy: Policy, reward: Reward, table: KernelTable) -> Objective:
    """Residual ∇-DB; with `model.no_flow` the guess alone."""
    m = config.model
    require_gradient(reward, config.experiment.method)
    log_reward = LogReward(policy, reward, m.reward_scale)
    estimator: Estimator
    if m.no_flow:
        estimator = Guess(policy, log_reward, m.reward_adaptive_mode)
    else:
        estimator = ResidualDB(
            policy,
            log_reward,
            m.reward_adaptive_mode,
            policy.make_flow(m.flow_channel_width, m.flow_layers_per_block, config.seed),
            reverse_scale=m.reverse_loss_scale,
            strength=m.pretrained_strength,
        )
    return MatchingObjective(
        policy, table, estimator, strength=m.pretrained_strength, trust=m.unet_reg_scale
    )


METHODS: dict[str, Callable[[Config, Policy, Reward, KernelTable], Objective]] = {
    "nabla-db": _nabla_db,
}
