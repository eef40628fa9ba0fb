"""From a config to its sampler and its objective."""

from __future__ import annotations

from ..config import Config, ConfigError
from ..core.grids import times_of
from ..core.kernels import KernelTable, kernel_table
from ..core.rules import RULES, Rule, is_straight
from ..core.samplers import find_sampler
from ..core.schedules import Schedule, schedule_of
from ..core.types import Objective, Policy
from ..rewards import require_gradient
from .parts import Parts
from .registry import amount_of_run, check_method, find_method


def build_kernel(config: Config, policy: Policy) -> KernelTable:
    """The sampler's table. Raises ConfigError when the settings give a step without noise, and when
    the LoRA would act in no step."""
    s = config.sampling
    try:
        times = times_of(s, policy)
        schedule = schedule_of(policy.noising, times, s.final_sigma)
        rule = _rule(config, schedule)
        table = kernel_table(schedule, amount_of_run(config), policy.prediction, rule)
    except ConfigError:  # names its key
        raise
    except ValueError as error:
        end = f" with config.sampling.final_sigma={s.final_sigma:g}" if s.final_sigma else ""
        raise ConfigError(f"config.sampling.num_steps={s.num_steps}{end}: {error}") from None
    until = config.model.lora_until
    if not table.steps_until(until):
        first = float(table.schedule.alpha_bar[0])
        raise ConfigError(
            f"config.model.lora_until={until:g} is below the share ᾱ={first:.3g} of signal with "
            "which the sampler starts, so that the LoRA would never act: give more"
        )
    return table


def _rule(config: Config, schedule: Schedule) -> Rule:
    """How the sampler's steps follow from the times. Raises ConfigError for one of flow models
    with another model."""
    sampler = find_sampler(config.sampling.scheduler)
    if sampler.flows_only and not is_straight(schedule):
        raise ConfigError(
            f"config.sampling.scheduler={sampler.name} is for flow models (α = 1 − σ), and "
            f"{config.pretrained.model} is none: take ddpm, ddim or dpm-solver"
        )
    return RULES[sampler.rule] if isinstance(sampler.rule, str) else sampler.rule


def build_objective(parts: Parts) -> Objective:
    """The objective of `experiment.method`.

    Raises ConfigError when the reward lacks a gradient, or for options that the method cannot have.
    """
    check_method(parts.config)
    method = find_method(parts.config.experiment.method)
    objective = method.objective(parts)
    if objective.uses_reward_gradient:
        require_gradient(parts.reward, method.name)
    return objective
