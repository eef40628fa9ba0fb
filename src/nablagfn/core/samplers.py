"""The samplers by name: each is a time grid and a rule for its steps (`rules`). Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import ConfigError, Sampling
from ..config.dotted import find_object

if TYPE_CHECKING:
    from .rules import Rule
    from .schedules import Noising

KEY = "config.sampling.scheduler"
POSTERIOR = "posterior"


@dataclass(frozen=True)
class Sampler:
    """A way to choose the times of N steps, and how much noise each adds.

    grid: the name of a grid that models know (`Policy.times`), or a function (noising, N) -> N
    times, noisiest first and without the clean end. eta: η in (0, 1]; None: sampling.eta. rule: how
    a step follows from the times, by name in `rules.RULES`, or a function; any but the posterior
    gets sampling.sde_noise for η. flows_only: it is for paths with α = 1 − σ. misses: why training
    with it cannot end at p_pretrained·exp(βr), empty where it can; unless: but with this
    sampling.sde_noise it can.
    """

    name: str
    grid: str | Callable[[Noising, int], Sequence[float]]
    eta: float | None = 1.0
    rule: str | Rule = POSTERIOR
    flows_only: bool = False
    misses: str = ""
    unless: float | None = None


SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddim", grid="ddim", eta=None),
        Sampler("ddpm", grid="ddim"),
        Sampler("dpm-solver", grid="dpm-solver"),
        Sampler(
            "flow-sde",
            grid="ddim",
            rule="flow-sde",
            flows_only=True,
            misses="its samples remember the noise they start from, which training does not move",
            unless=2**0.5,  # of the memoryless process
        ),
        Sampler(
            "cps",
            grid="ddim",
            rule="cps",
            flows_only=True,
            misses="its steps draw more noise than the model has taken out, so that already "
            "untrained it does not draw from p_pretrained",
        ),
    )
}


def find_sampler(name: str) -> Sampler:
    """One of this package, or `package.module:object`. Raises ConfigError when there is none."""
    return find_object(name, SAMPLERS, KEY, Sampler)


def amount_of(sampling: Sampling) -> float:
    """η of the run, or what its sampler has in its place: how much noise a step draws.

    Raises ConfigError when sampling.eta or sampling.sde_noise is set for a sampler without it, and
    for more noise than cps has. A method may draw without noise instead
    (`methods.registry.amount_of_run`).
    """
    sampler = find_sampler(sampling.scheduler)
    if sampler.rule != POSTERIOR:
        return _sde_noise(sampling, sampler)
    if sampling.sde_noise != type(sampling)().sde_noise:
        able = ", ".join(s.name for s in SAMPLERS.values() if s.rule != POSTERIOR)
        raise ConfigError(
            f"config.sampling.sde_noise={sampling.sde_noise:g} has a meaning for {able} only: "
            f"leave it out with config.sampling.scheduler={sampling.scheduler}"
        )
    if sampler.eta is None:
        return sampling.eta
    if sampling.eta not in (1.0, sampler.eta):
        raise ConfigError(
            f"config.sampling.eta={sampling.eta} has a meaning for samplers without an η of their "
            f"own (ddim): {sampling.scheduler} has {sampler.eta:g}"
        )
    return sampler.eta


def _sde_noise(sampling: Sampling, sampler: Sampler) -> float:
    if sampling.eta != 1:
        raise ConfigError(
            f"config.sampling.eta={sampling.eta:g} has no meaning for {sampling.scheduler}: set "
            "config.sampling.sde_noise"
        )
    if sampler.rule == "cps" and sampling.sde_noise > 1:
        raise ConfigError(
            f"config.sampling.sde_noise={sampling.sde_noise:g}: at 1 all noise of cps is new, "
            "give 1 or less"
        )
    return sampling.sde_noise


def misses(sampling: Sampling) -> str:
    """Why training with the run's sampler cannot end at p_pretrained·exp(βr); empty where it can,
    up to the error of its steps."""
    sampler = find_sampler(sampling.scheduler)
    if sampler.unless is not None and abs(sampling.sde_noise / sampler.unless - 1) < 0.005:
        return ""
    return sampler.misses


def forgets(sampling: Sampling) -> bool:
    """Whether its steps are those of the forward process run back, so that x_N forgets x_0."""
    return find_sampler(sampling.scheduler).rule == POSTERIOR and amount_of(sampling) == 1
