"""Gaussian denoising kernels p(x_{k+1} | x_k) = N(on_x·x + on_clean·x̂, std²) and their algebra.

With x_k = α_k·x_clean + σ_k·noise, one formula serves most samplers:

    std = η·σ'·√(1 − (ασ'/(α'σ))²),   on_x = √(σ'² − std²)/σ,   on_clean = α' − α·on_x

η = 1 is the DDPM posterior and first-order SDE-DPM-Solver++ (Lu et al. 2022, eq. 18), η in between
DDIM(η) (Song et al. 2021, eq. 12 and 16), and η = 0 the probability-flow step, Euler's of a flow
model with α = 1 − t, σ = t. The formula is finite at α = 0. Other samplers have other coefficients
(`rules`). A network's output u is an affine function of x̂, so the mean is c1·x + c2·u for all.

Tables are built in float64; all functions keep the dtype of x (float32 or float64).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .rules import Rule, posterior
from .schedules import Prediction, Schedule, clean_of_output


@dataclass(frozen=True)
class Level:
    """How noisy M samples are, shaped to broadcast against x [M, ...]; time: [M], for the model.

    alpha_bar: ᾱ = α²/(α² + σ²) in 0..1, the share of the signal. clean_x, clean_output: x̂ is
    clean_x·x + clean_output·u. end_scale, end_std: x = end_scale·x_N + end_std·noise, relative to
    the sampler's end, which keeps some noise (`seen_from_end`). end_x, end_clean: what is predicted
    of x_N is end_x·x + end_clean·x̂.
    """

    time: Tensor
    alpha: Tensor
    sigma: Tensor
    alpha_bar: Tensor
    clean_x: Tensor
    clean_output: Tensor
    end_scale: Tensor
    end_std: Tensor
    end_x: Tensor
    end_clean: Tensor

    def __getitem__(self, rows: Tensor) -> Level:
        """The levels of these samples, [n] integers on the device."""
        return Level(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Step:
    """The coefficients of M transitions, shaped to broadcast against x [M, ...].

    here, next: the levels of x_k and x_{k+1}. last: [M] booleans, True where x_{k+1} is the clean
    sample x_N. noisy: the other rows, integers that stay on the CPU: what is to be evaluated is
    known without asking the device. c1, c2, std: of the kernel in x and u. eps_slope: ∂ε/∂u at x_k.
    back_x, back_std: q(x_k|x_{k+1}) = N(back_x·x_{k+1}, back_std²), the forward process. bridge_x,
    bridge_end: E[x_{k+1}|x_k, x_N] = bridge_x·x_k + bridge_end·x_N under it.
    """

    here: Level
    next: Level
    last: Tensor
    noisy: Tensor
    c1: Tensor
    c2: Tensor
    std: Tensor
    eps_slope: Tensor
    back_x: Tensor
    back_std: Tensor
    bridge_x: Tensor
    bridge_end: Tensor


@dataclass(frozen=True, eq=False)
class KernelTable:
    """All N transitions of one sampler, noisiest first.

    schedule: [N+1] levels, the last is the clean end. on_x, on_clean, std: [N] float64, the
    kernel's coefficients. prediction: what the network's output u means; clean: [2, N+1] float64,
    x̂ = clean[0]·x + clean[1]·u at each level.
    """

    schedule: Schedule
    prediction: Prediction
    clean: Tensor
    on_x: Tensor
    on_clean: Tensor
    std: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.std)

    @property
    def ode(self) -> bool:
        """Whether no step adds noise (η = 0), so that no step has a density."""
        return not bool(self.std.any())

    @property
    def time(self) -> Tensor:
        """[N+1] float64, the model's time of x_0 … x_N."""
        return self.schedule.time

    @property
    def start_std(self) -> float:
        """Standard deviation √(α² + σ²) of x_0, of data with unit variance."""
        alpha, sigma = self.schedule.alpha[0], self.schedule.sigma[0]
        return float((alpha.square() + sigma.square()).sqrt())

    @functools.cached_property
    def c1(self) -> Tensor:
        """[N] float64, the coefficient of x in the mean."""
        return self.on_x + self.on_clean * self.clean[0, :-1]

    @functools.cached_property
    def c2(self) -> Tensor:
        """[N] float64, the coefficient of u in the mean."""
        return self.on_clean * self.clean[1, :-1]

    @functools.cached_property
    def coefficients(self) -> Tensor:
        """[26, N] float64: nine of each level at x_k, then at x_{k+1}, then eight of the step."""
        alpha, sigma = self.schedule.alpha, self.schedule.sigma
        end = seen_from_end(self.schedule)
        level = torch.stack([alpha, sigma, self.schedule.alpha_bar, *self.clean, *end])
        a, s, a_next, s_next = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
        back = a / a_next
        bridge_x, bridge_end = bridge(*end[:2])
        step = torch.stack(
            [
                self.c1,
                self.c2,
                self.std,
                -a * self.clean[1, :-1] / s,
                back,
                (s.square() - (back * s_next).square()).sqrt(),
                bridge_x,
                bridge_end,
            ]
        )
        return torch.cat([level[:, :-1], level[:, 1:], step])

    def at(self, step: Tensor, like: Tensor) -> Step:
        """Coefficients of the steps `step` ([M] in 0..N-1), on the device and dtype of `like`.

        With `step` on the CPU nothing waits for the device.
        """
        coefficients, times = _resident(self, like.device, like.dtype)
        k = step.to(like.device, non_blocking=True)
        shape = (len(coefficients), -1, *([1] * (like.ndim - 1)))
        found = coefficients[:, k].reshape(shape).unbind(0)
        return Step(
            Level(times[k], *found[:9]),
            Level(times[k + 1], *found[9:18]),
            k + 1 == self.num_steps,
            (step.cpu() + 1 != self.num_steps).nonzero()[:, 0],
            *found[18:],
        )

    def steps_until(self, alpha_bar: float) -> int:
        """The number of steps, from the noisiest, whose first states have no more than that share
        ᾱ of signal; 1: all."""
        if alpha_bar == 1:
            return self.num_steps
        return int((self.schedule.alpha_bar[:-1] <= alpha_bar).sum())

    def at_step(self, step: int, like: Tensor) -> Step:
        """`at` for one step shared by the whole batch, without copies between host and device."""
        one = _one_step(self, step, like.device, like.dtype, like.ndim)
        rows = len(like)
        return replace(
            one,
            noisy=torch.arange(rows if step + 1 < self.num_steps else 0),
            here=replace(one.here, time=one.here.time.expand(rows)),
            next=replace(one.next, time=one.next.time.expand(rows)),
            last=one.last.expand(rows),
        )


@functools.lru_cache(maxsize=16)
def _resident(
    table: KernelTable, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The table's coefficients [26, N] and its times [N+1], kept on a device."""
    return table.coefficients.to(dtype).to(device), table.time.to(dtype).to(device)


@functools.lru_cache(maxsize=4096)
def _one_step(
    table: KernelTable, step: int, device: torch.device, dtype: torch.dtype, ndim: int
) -> Step:
    """The step's coefficients as [1, ...] tensors, kept: a sampler asks for them every epoch."""
    like = torch.empty([1] * ndim, device=device, dtype=dtype)
    return table.at(torch.tensor([step]), like)


def seen_from_end(schedule: Schedule) -> Tensor:
    """end_scale, end_std, end_x and end_clean of each level, [4, N+1] float64 (`Level`).

    The sampler's end x_N = α_N·x_clean + σ_N·noise keeps some noise. With x = α·x_clean + σ·noise
    from the forward process x_N → x, of scale a = α/α_N and deviation s = √(σ² − (aσ_N)²),

        E[x_N|x, x_clean] = α_N·x_clean + (aσ_N²/σ²)(x − α·x_clean)
    """
    alpha, sigma = schedule.alpha, schedule.sigma
    scale = alpha / alpha[-1]
    std = (sigma.square() - (scale * sigma[-1]).square()).clamp(min=0).sqrt()
    end_x = torch.where(sigma > 0, scale * sigma[-1].square() / sigma.square(), 1.0)
    return torch.stack([scale, std, end_x, alpha[-1] - end_x * alpha])


def bridge(scale: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """bridge_x and bridge_end, [N] each, from end_scale and end_std [N+1] of the levels.

    With R = (a·s'/(a'·s))²: (a'/a)·R of x_k and a'·(1 − R) of x_N; finite at a = 0.
    """
    a, s, a_next, s_next = scale[:-1], std[:-1], scale[1:], std[1:]
    on_x = a * s_next.square() / (a_next * s.square())
    return on_x, a_next - a * on_x


def kernel_table(
    schedule: Schedule, amount: float, prediction: Prediction, rule: Rule = posterior
) -> KernelTable:
    """The kernels of a time grid. amount: of the noise that the rule draws, the posterior's η.

    Raises ValueError for what the rule cannot have, for an unknown prediction, and for an
    ε-prediction at α = 0, which says nothing of x̂.
    """
    found = rule(schedule, amount)
    if prediction == "epsilon" and not bool(schedule.alpha[0] > 0):
        raise ValueError(
            "an ε-prediction cannot start at zero signal (α = 0), where ε says nothing of the "
            "clean sample: start a step later, or take a model that predicts v"
        )
    return KernelTable(
        schedule=schedule,
        prediction=prediction,
        clean=clean_of_output(schedule, prediction),
        on_x=found.on_x,
        on_clean=found.on_clean,
        std=found.std,
    )


def mean(x: Tensor, output: Tensor, k: Step) -> Tensor:
    """m(x_k) = c1·x + c2·u, [M, ...]."""
    return k.c1 * x + k.c2 * output


def predict_clean(x: Tensor, output: Tensor, level: Level) -> Tensor:
    """x̂ = E[x_clean|x], the one-step (Tweedie) prediction of the clean sample, [M, ...]."""
    return level.clean_x * x + level.clean_output * output


def predict_end(x: Tensor, output: Tensor, level: Level) -> Tensor:
    """E[x_N|x], what is predicted of the sampler's own end, [M, ...]."""
    return level.end_x * x + level.end_clean * predict_clean(x, output, level)


def bridge_noise(x: Tensor, x_end: Tensor, output: Tensor, k: Step) -> Tensor:
    """z̄ = (E[x_{k+1}|x_k, x_N] − m(x_k))/σ, [M, ...]: what of the step's noise x_N tells.

    Where the sampler is the inverse of the forward process it is the mean of (x_{k+1} − m)/σ given
    x_k and x_N, with a small part of its variance. Elsewhere ρ·z̄ is nearer (`bridge_slope`).
    """
    return (k.bridge_x * x + k.bridge_end * x_end - mean(x, output, k)) / k.std


def moved_mean(output: Tensor, output_ref: Tensor, k: Step) -> Tensor:
    """(m − m_#)/σ of two outputs at one state, [M, ...]."""
    return k.c2 / k.std * (output - output_ref)


def step_noise(x: Tensor, x_next: Tensor, output: Tensor, k: Step) -> Tensor:
    """z = (x_{k+1} − m(x_k))/σ, the noise that took the step, [M, ...]."""
    return (x_next - mean(x, output, k)) / k.std


def bridge_slope(x: Tensor, x_next: Tensor, x_end: Tensor, output: Tensor, k: Step) -> float:
    """ρ = E[z·z̄]/E[z̄·z̄] over n paths of the sampler, z = (x_{k+1} − m)/σ.

    How much of what x_N tells of the step the sampler's own noise has followed: 1 where it is the
    inverse of the forward process. What the paths do not tell from 1 is drawn towards it: 1 + (ρ −
    1)·max(0, 1 − e²/(ρ − 1)²), e the standard error (James & Stein's positive part).
    """
    seen = bridge_noise(x, x_end, output, k)
    drawn = step_noise(x, x_next, output, k)
    both = (drawn * seen).flatten(1).double().sum(1)
    square = seen.flatten(1).double().square().sum(1)
    slope = float(both.mean() / square.mean())
    error = float((both - slope * square).std() / square.mean()) / len(x) ** 0.5
    away = slope - 1
    return 1 + away * max(0.0, 1 - (error / away) ** 2) if away and math.isfinite(away) else 1.0


def score_next(x: Tensor, x_next: Tensor, output: Tensor, k: Step) -> Tensor:
    """∇_{x_{k+1}} log p(x_{k+1}|x_k) = −(x_{k+1} − m)/σ², [M, ...]."""
    return (mean(x, output, k) - x_next) / k.std**2


def log_prob(x: Tensor, x_next: Tensor, output: Tensor, k: Step) -> Tensor:
    """log p(x_{k+1}|x_k) in nats, summed over the sample's elements, [M]."""
    normal = torch.distributions.Normal(mean(x, output, k), k.std.expand_as(x))
    return normal.log_prob(x_next).flatten(1).sum(1)


def log_ratio(x: Tensor, x_next: Tensor, output: Tensor, output_base: Tensor, k: Step) -> Tensor:
    """log [p_u(x_{k+1}|x_k) / p_base(x_{k+1}|x_k)] in nats, element by element, [M, ...].

    = d·z − d²/2 with d = (m − m_base)/σ and z = (x_{k+1} − m_base)/σ: exactly 0 where u is the
    base's, without the difference of two large densities.
    """
    moved = moved_mean(output, output_base, k)
    z = step_noise(x, x_next, output_base, k)
    return moved * (z - moved / 2)


def renoise(x_next: Tensor, noise: Tensor, k: Step) -> Tensor:
    """x_k ~ q(x_k|x_{k+1}), the forward process one step back, [M, ...]; noise standard normal."""
    return k.back_x * x_next + k.back_std * noise


def along(z: Tensor, basis: Tensor) -> Tensor:
    """The part of z [M, ...] within orthonormal directions [D, count]."""
    basis = basis.to(z.dtype)
    return (z.flatten(1) @ basis @ basis.T).reshape(z.shape)
