"""Where the steps of a sampler lie: equal steps of the time, of the log-SNR, or of the noise angle.

The KL of one step of two samplers that differ by Δε is ½(SNR_{k+1}/SNR_k − 1)‖Δε‖² (η = 1), so
equal steps of the log-SNR log(α²/σ²) weigh all steps alike. Equal steps of the angle arctan(σ/α)
also reach noise without any signal, where the log-SNR is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..config import ConfigError, Sampling
from .kernels import KernelTable
from .samplers import find_sampler
from .schedules import Noising
from .types import Policy

LATE = 0.15  # √ᾱ of a first level that is no longer noise


def times_of(sampling: Sampling, policy: Policy) -> Sequence[float]:
    """The times of the run's steps, noisiest first, without the clean end.

    Raises ConfigError for sampling.spacing beside a sampler that gives its own times, and
    ValueError for more steps than there are times.
    """
    grid, steps = find_sampler(sampling.scheduler).grid, sampling.num_steps
    if sampling.spacing == "leading":
        return policy.times(grid, steps) if isinstance(grid, str) else grid(policy.noising, steps)
    if not isinstance(grid, str):
        raise ConfigError(
            f"config.sampling.spacing={sampling.spacing} does not go with "
            f"config.sampling.scheduler={sampling.scheduler}, which gives its own times: leave the "
            "spacing out"
        )
    return spaced_times(policy.noising, sampling.spacing, steps)


def spaced_times(noising: Noising, spacing: str, num_steps: int) -> list[float]:
    """N times, noisiest first from the noisiest of all, without the clean end.

    spacing: "trailing" (equal steps of the time), "logsnr" or "angle". Where times are whole
    numbers they are the nearest ones that fall strictly. Raises ValueError for another spacing and
    for more steps than there are noisy times, ConfigError for logsnr where the noisiest has no
    signal.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, not {spacing}")
    times = SPACINGS[spacing](noising, num_steps)
    if not noising.whole:
        return times
    first, last = round(noising.cleanest) + 1, round(noising.noisiest)
    if num_steps > last + 1 - first:
        raise ValueError(f"a model with the times {first}..{last} has no {num_steps} noisy steps")
    return [float(time) for time in distinct([round(time) for time in times], first, last)]


def late_start(table: KernelTable, noising: Noising) -> str:
    """What to say of a sampler that draws x_0 from a normal distribution although much of the
    signal is left at its first level; empty where little more is than at the noisiest."""
    alpha = float(table.schedule.alpha_bar[0].sqrt())
    least = math.cos(angles(noising)[1])
    if alpha <= LATE or alpha <= 1.5 * least:
        return ""
    return (
        f"the first of config.sampling.num_steps={table.num_steps} steps starts at "
        f"{alpha:.0%} of the signal as if it were noise alone: take more steps, or "
        "config.sampling.spacing=trailing, logsnr or angle, which start from the noisiest level"
    )


def distinct(times: Sequence[int], first: int, last: int) -> list[int]:
    """Falling whole numbers in first..last, as near to `times` as leaves them distinct."""
    found, least = [], first
    for time in reversed(times):  # those at the clean end give way to noisier ones
        found.append(max(time, least))
        least = found[-1] + 1
    found.reverse()
    most = last
    for k, time in enumerate(found):
        found[k] = min(time, most)
        most = found[k] - 1
    return found


def trailing(noising: Noising, num_steps: int) -> list[float]:
    """Equal steps of the time; whole numbers as diffusers' "trailing", from the last one."""
    if noising.whole:
        count = noising.noisiest + 1
        return [round(count * (num_steps - k) / num_steps) - 1 for k in range(num_steps)]
    first, last = noising.cleanest, noising.noisiest
    return [last + (first - last) * k / num_steps for k in range(num_steps)]


def by_angle(noising: Noising, num_steps: int) -> list[float]:
    """Equal steps of arctan(σ/α)."""
    first, last = angles(noising)
    steps = [first + (last - first) * k / num_steps for k in range(num_steps, 0, -1)]
    return [noising.time_at(angle) for angle in steps]


def by_log_snr(noising: Noising, num_steps: int) -> list[float]:
    """Equal steps of log(α²/σ²) = −2·log tan(angle). Raises ConfigError at zero signal."""
    first, last = angles(noising)
    if math.cos(last) < 1e-12:
        raise ConfigError(
            "config.sampling.spacing=logsnr: the noisiest level has no signal, where the log-SNR "
            "is infinite: take angle"
        )
    low, high = math.log(math.tan(first)), math.log(math.tan(last))
    return [
        noising.time_at(math.atan(math.exp(high + (low - high) * k / num_steps)))
        for k in range(num_steps)
    ]


def angles(noising: Noising) -> list[float]:
    """arctan(σ/α) of the cleanest and of the noisiest level, radians in 0..π/2."""
    ends = torch.tensor([noising.cleanest, noising.noisiest], dtype=torch.float64)
    levels = noising.levels(ends)
    found: list[float] = torch.atan2(levels.sigma, levels.alpha).tolist()
    return found


SPACINGS: dict[str, Callable[[Noising, int], list[float]]] = {
    "trailing": trailing,
    "logsnr": by_log_snr,
    "angle": by_angle,
}
