"""The samplers by name: each is a time grid and an η (`kernels`). Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config import ConfigError, Sampling
from ..config.dotted import find_object

if TYPE_CHECKING:
    from .schedules import Noising

KEY = "config.sampling.scheduler"


@dataclass(frozen=True)
class Sampler:
    """A way to choose the times of N steps, and how much noise each adds.

    grid: the name of a grid that models know (`Policy.times`), or a function (noising, N) -> N
    times, noisiest first and without the clean end. eta: η in (0, 1]; None: sampling.eta.
    """

    name: str
    grid: str | Callable[[Noising, int], Sequence[float]]
    eta: float | None = 1.0


SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddim", grid="ddim", eta=None),
        Sampler("ddpm", grid="ddim"),
        Sampler("dpm-solver", grid="dpm-solver"),
    )
}


def find_sampler(name: str) -> Sampler:
    """One of this package, or `package.module:object`. Raises ConfigError when there is none."""
    return find_object(name, SAMPLERS, KEY, Sampler)


def eta_of(sampling: Sampling) -> float:
    """η of the run's sampler. Raises ConfigError when sampling.eta is set for one that has its own.

    A method may draw without noise instead (`methods.registry.eta_of_run`).
    """
    sampler = find_sampler(sampling.scheduler)
    if sampler.eta is None:
        return sampling.eta
    if sampling.eta not in (1.0, sampler.eta):
        raise ConfigError(
            f"config.sampling.eta={sampling.eta} has a meaning for samplers without an η of their "
            f"own (ddim): {sampling.scheduler} has {sampler.eta:g}"
        )
    return sampler.eta
