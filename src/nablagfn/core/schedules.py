"""How noisy a sample is at which time, and what a network's output says of the clean sample.

x = α(t)·x_clean + σ(t)·noise. A model brings its `Noising`, a sampler the times; together they are
a `Schedule`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

# What u is: ε, v = αε − σx_clean (Salimans & Ho 2022), x_clean itself, or ε − x_clean, the velocity
# of x = (1 − t)·x_clean + t·ε (Lipman et al. 2023; the sign of SD3 and FLUX)
Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


def share_of_signal(alpha: Tensor, sigma: Tensor) -> Tensor:
    """ᾱ = α²/(α² + σ²) in 0..1."""
    return alpha.square() / (alpha.square() + sigma.square())


@dataclass(frozen=True, eq=False)
class Schedule:
    """N+1 levels, noisiest first, each [N+1] float64 on the CPU; time is what the model is told.

    Raises ValueError unless α/σ rises strictly.
    """

    time: Tensor
    alpha: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        rising = self.alpha[1:] * self.sigma[:-1] > self.alpha[:-1] * self.sigma[1:]
        known = (self.alpha >= 0) & (self.sigma >= 0)
        if not bool(rising.all() & known.all() & (self.sigma[:-1] > 0).all()):
            raise ValueError(
                f"the times {_some(self.time)} do not lead from noise to "
                "clean: every step needs noise, so they must fall strictly and stay above the end"
            )

    @property
    def alpha_bar(self) -> Tensor:
        """ᾱ, [N+1]: the share of the signal."""
        return share_of_signal(self.alpha, self.sigma)


def _some(time: Tensor) -> str:
    """The times, or the ends of many."""
    words = [f"{t:.6g}" for t in time.tolist()]
    return ", ".join(words if len(words) <= 12 else [*words[:4], "…", *words[-4:]])


@dataclass(frozen=True)
class Levels:
    """α and σ, each of the shape of the times they were asked for, float64."""

    alpha: Tensor
    sigma: Tensor

    @property
    def alpha_bar(self) -> Tensor:
        """ᾱ: the share of the signal."""
        return share_of_signal(self.alpha, self.sigma)


class Noising(Protocol):
    """The forward process of a model. noisiest, cleanest: the times of its ends.

    whole: its times are whole numbers.
    """

    @property
    def whole(self) -> bool: ...

    @property
    def noisiest(self) -> float: ...

    @property
    def cleanest(self) -> float: ...

    def levels(self, time: Tensor) -> Levels:
        """α and σ at these times. Raises ValueError for one that the model does not know."""
        ...

    def time_of(self, sigma: float) -> float:
        """The time at which σ is that; the nearest where times are whole numbers."""
        ...

    def time_at(self, angle: float) -> float:
        """The time at which arctan(σ/α) is that, radians; the nearest of whole numbers."""
        ...


@dataclass(frozen=True, eq=False)
class DiscreteNoising:
    """Training levels ᾱ [T] of a variance-preserving model, by whole-numbered times 0..T-1."""

    alphas_cumprod: Tensor
    cleanest: float = 0.0
    whole: bool = True

    @property
    def noisiest(self) -> float:
        return float(len(self.alphas_cumprod) - 1)

    @functools.cached_property
    def _wide(self) -> Tensor:
        return self.alphas_cumprod.double().cpu()

    def levels(self, time: Tensor) -> Levels:
        known = (time >= 0) & (time <= self.noisiest) & (time == time.round())
        if not bool(known.all()):
            raise ValueError(
                f"the times {_some(time)} must be whole numbers in 0..{self.noisiest:.0f}"
            )
        alpha_bar = self._wide[time.long().cpu()]
        return Levels(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    def time_of(self, sigma: float) -> float:
        return float(((1 - self._wide).sqrt() - sigma).abs().argmin())

    def time_at(self, angle: float) -> float:
        angles = torch.atan2((1 - self._wide).sqrt(), self._wide.sqrt())
        return float((angles - angle).abs().argmin())


@dataclass(frozen=True)
class AngleNoising:
    """α = cos, σ = sin of an angle that is uniform in the times 0..last (Nichol & Dhariwal 2021).

    Against Stable Diffusion's schedule with uniform steps it has a third of the discretisation
    error. first_angle: at time 0, radians; gap: how far the last lies from π/2.
    """

    last: int
    first_angle: float
    gap: float
    cleanest: float = 0.0
    whole: bool = True

    @property
    def noisiest(self) -> float:
        return float(self.last)

    @property
    def _step(self) -> float:
        return (math.pi / 2 - self.gap - self.first_angle) / self.last

    def levels(self, time: Tensor) -> Levels:
        angle = self.first_angle + self._step * wide(time)
        return Levels(angle.cos(), angle.sin())

    def time_of(self, sigma: float) -> float:
        return self.time_at(math.asin(sigma))

    def time_at(self, angle: float) -> float:
        return float(round((angle - self.first_angle) / self._step))


@dataclass(frozen=True)
class LinearNoising:
    """Flow matching's straight path α = 1 − t, σ = t (Lipman et al. 2023), t in cleanest..1."""

    cleanest: float = 0.0
    noisiest: float = 1.0
    whole: bool = False

    def levels(self, time: Tensor) -> Levels:
        t = wide(time)
        return Levels(1 - t, t)

    def time_of(self, sigma: float) -> float:
        return sigma

    def time_at(self, angle: float) -> float:
        return math.sin(angle) / (math.sin(angle) + math.cos(angle))


def wide(time: Tensor) -> Tensor:
    """Return times in float64 where the device has it (Apple's does not)."""
    return time.float() if time.device.type == "mps" else time.double()


def schedule_of(noising: Noising, times: Sequence[float], final_sigma: float = 0.0) -> Schedule:
    """The levels at `times` (noisiest first) and at the clean end.

    final_sigma: σ of the end; 0 is the model's own. x_N keeps that much noise, which is the bias of
    a sampler whose every step has a density. Raises ValueError when the times do not fall.
    """
    end = noising.time_of(final_sigma) if final_sigma else noising.cleanest
    time = torch.tensor([*times, end], dtype=torch.float64)
    levels = noising.levels(time)
    return Schedule(time, levels.alpha, levels.sigma)


def clean_of_output(levels: Schedule | Levels, prediction: Prediction) -> Tensor:
    """x̂ = found[0]·x + found[1]·u, [2, ...]. Raises ValueError for an unknown prediction.

    Where α = 0 an ε-prediction gives infinities: `kernel_table` refuses it.
    """
    alpha, sigma = levels.alpha, levels.sigma
    if prediction == "epsilon":
        return torch.stack([1 / alpha, -sigma / alpha])
    if prediction == "sample":
        return torch.stack([torch.zeros_like(alpha), torch.ones_like(alpha)])
    if prediction == "v_prediction":
        return torch.stack([alpha, -sigma]) / (alpha.square() + sigma.square())
    if prediction == "flow":
        return torch.stack([torch.ones_like(alpha), -sigma]) / (alpha + sigma)
    raise ValueError(
        f"prediction_type '{prediction}' is unknown: use epsilon, v_prediction, sample or flow"
    )


def output_of(x_clean: Tensor, eps: Tensor, levels: Levels, prediction: Prediction) -> Tensor:
    """u of a model that predicts x̂ and ε = (x − αx̂)/σ, [M, ...]; levels shaped to broadcast."""
    if prediction == "epsilon":
        return eps
    if prediction == "sample":
        return x_clean
    if prediction == "v_prediction":
        return levels.alpha * eps - levels.sigma * x_clean
    if prediction == "flow":
        return eps - x_clean
    raise ValueError(f"prediction_type '{prediction}' is unknown")
