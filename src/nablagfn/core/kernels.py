"""Gaussian denoising kernels p(x_{k+1} | x_k) = N(c1·x + c2·ε, std²) and their algebra (layer 1).

Every kernel is affine in ε, so one table of (c1, c2, std, ᾱ) per step serves sampling and every
objective. Tables are built in float64; all functions keep the dtype of x (float32 or float64).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """The coefficients of M transitions, shaped to broadcast against x [M, ...].

    timestep, timestep_next: [M] integers, the model's time of x_k and x_{k+1} (0 when clean).
    last: [M] booleans, True where x_{k+1} is the clean sample x_N. noisy: the other rows, integers
    that stay on the CPU: what is to be evaluated is known without asking the device.
    """

    timestep: Tensor
    timestep_next: Tensor
    last: Tensor
    noisy: Tensor
    alpha_bar: Tensor
    alpha_bar_next: Tensor
    c1: Tensor
    c2: Tensor
    std: Tensor


@dataclass(frozen=True, eq=False)
class KernelTable:
    """All N transitions of one sampler, noisiest first.

    timestep, alpha_bar: [N+1], the last entry is the clean end. c1, c2, std: [N] float64.
    """

    timestep: Tensor
    alpha_bar: Tensor
    c1: Tensor
    c2: Tensor
    std: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.std)

    def at(self, step: Tensor, like: Tensor) -> Step:
        """Coefficients of the steps `step` ([M] in 0..N-1), on the device and dtype of `like`.

        With `step` on the CPU nothing waits for the device.
        """
        coefficients, times = _resident(self, like.device, like.dtype)
        k = step.to(like.device, non_blocking=True)
        shape = (len(coefficients), -1, *([1] * (like.ndim - 1)))
        alpha_bar, alpha_bar_next, c1, c2, std = coefficients[:, k].reshape(shape).unbind(0)
        timestep, timestep_next = times[:, k].unbind(0)
        return Step(
            timestep=timestep,
            timestep_next=timestep_next,
            last=k + 1 == self.num_steps,
            noisy=(step.cpu() + 1 != self.num_steps).nonzero()[:, 0],
            alpha_bar=alpha_bar,
            alpha_bar_next=alpha_bar_next,
            c1=c1,
            c2=c2,
            std=std,
        )

    def at_step(self, step: int, like: Tensor) -> Step:
        """`at` for one step shared by the whole batch, without copies between host and device."""
        one = _one_step(self, step, like.device, like.dtype, like.ndim)
        return replace(
            one,
            noisy=torch.arange(len(like) if step + 1 < self.num_steps else 0),
            timestep=one.timestep.expand(len(like)),
            timestep_next=one.timestep_next.expand(len(like)),
            last=one.last.expand(len(like)),
        )


@functools.lru_cache(maxsize=16)
def _resident(
    table: KernelTable, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(ᾱ_k, ᾱ_{k+1}, c1, c2, std) [5, N] and (timestep, timestep_next) [2, N], kept on a device."""
    level, time = table.alpha_bar, table.timestep
    coefficients = torch.stack([level[:-1], level[1:], table.c1, table.c2, table.std])
    return coefficients.to(dtype).to(device), torch.stack([time[:-1], time[1:]]).to(device)


@functools.lru_cache(maxsize=4096)
def _one_step(
    table: KernelTable, step: int, device: torch.device, dtype: torch.dtype, ndim: int
) -> Step:
    """The step's coefficients as [1, ...] tensors, kept: a sampler asks for them every epoch."""
    like = torch.empty([1] * ndim, device=device, dtype=dtype)
    return table.at(torch.tensor([step]), like)


def _levels(alphas_cumprod: Tensor, timesteps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Times [N+1] and signal levels ᾱ [N+1]; the clean end has ᾱ = alphas_cumprod[0], not 1.

    Raises ValueError when a step would add no noise (its density would not exist).
    """
    if not all(0 < t < len(alphas_cumprod) for t in timesteps):
        raise ValueError(
            f"the timesteps {list(timesteps)} must lie in 1..{len(alphas_cumprod) - 1}"
        )
    times = torch.tensor([*timesteps, 0], dtype=torch.long)
    alpha_bar = alphas_cumprod.double().cpu()[times]
    if not bool(alpha_bar.min() > 0):
        raise ValueError("a schedule that reaches ᾱ = 0 (zero terminal SNR) is not supported")
    if not bool((alpha_bar[1:] > alpha_bar[:-1]).all()):
        raise ValueError(
            f"the timesteps {list(timesteps)} must fall strictly and stay above 0: every step "
            "needs noise"
        )
    return times, alpha_bar


def ddim(alphas_cumprod: Tensor, timesteps: Sequence[int], eta: float = 1.0) -> KernelTable:
    """DDIM(η) (Song et al. 2021, eq. 12 and 16); η = 1 is the DDPM posterior.

    alphas_cumprod: [T] training signal levels. Raises ValueError unless 0 < eta <= 1.
    """
    if not 0 < eta <= 1:
        raise ValueError(f"eta must be in (0, 1], got {eta}: at 0 the sampler has no density")
    times, alpha_bar = _levels(alphas_cumprod, timesteps)
    a, a_next = alpha_bar[:-1], alpha_bar[1:]
    variance = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
    ratio = (a_next / a).sqrt()
    return KernelTable(
        timestep=times,
        alpha_bar=alpha_bar,
        c1=ratio,
        c2=(1 - a_next - variance).clamp(min=0).sqrt() - ratio * (1 - a).sqrt(),
        std=variance.sqrt(),
    )


def sde_dpm_solver(alphas_cumprod: Tensor, timesteps: Sequence[int]) -> KernelTable:
    """First-order SDE-DPM-Solver++ (Lu et al. 2022, eq. 18), ending at alphas_cumprod[0].

    mean = (σ'/σ)·e^{-h}·x + α'(1 − e^{-2h})·x̂, std = σ'·√(1 − e^{-2h}), h = λ' − λ with
    λ = log(α/σ); written in ε by x̂ = (x − σε)/α.
    """
    times, alpha_bar = _levels(alphas_cumprod, timesteps)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    lam = (alpha / sigma).log()
    h = lam[1:] - lam[:-1]
    toward_clean = alpha[1:] * -torch.expm1(-2 * h)
    return KernelTable(
        timestep=times,
        alpha_bar=alpha_bar,
        c1=sigma[1:] / sigma[:-1] * (-h).exp() + toward_clean / alpha[:-1],
        c2=-toward_clean * sigma[:-1] / alpha[:-1],
        std=sigma[1:] * (-torch.expm1(-2 * h)).sqrt(),
    )


def mean(x: Tensor, eps: Tensor, k: Step) -> Tensor:
    """m(x_k) = c1·x + c2·ε, [M, ...]."""
    return k.c1 * x + k.c2 * eps


def predict_clean(x: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """x̂ = (x − √(1−ᾱ)·ε)/√ᾱ, the one-step (Tweedie) prediction of the clean sample, [M, ...]."""
    return (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()


def score_next(x: Tensor, x_next: Tensor, eps: Tensor, k: Step) -> Tensor:
    """∇_{x_{k+1}} log p(x_{k+1}|x_k) = −(x_{k+1} − m)/σ², [M, ...]."""
    return (mean(x, eps, k) - x_next) / k.std**2


def log_prob(x: Tensor, x_next: Tensor, eps: Tensor, k: Step) -> Tensor:
    """log p(x_{k+1}|x_k) in nats, summed over the sample's elements, [M]."""
    normal = torch.distributions.Normal(mean(x, eps, k), k.std.expand_as(x))
    return normal.log_prob(x_next).flatten(1).sum(1)


def log_ratio(x: Tensor, x_next: Tensor, eps: Tensor, eps_base: Tensor, k: Step) -> Tensor:
    """log [p_ε(x_{k+1}|x_k) / p_base(x_{k+1}|x_k)] in nats, element by element, [M, ...].

    = u·z − u²/2 with u = (m − m_base)/σ and z = (x_{k+1} − m_base)/σ: exactly 0 where ε is the
    base's, without the difference of two large densities.
    """
    u = k.c2 / k.std * (eps - eps_base)
    z = (x_next - mean(x, eps_base, k)) / k.std
    return u * (z - u / 2)


def renoise(x_next: Tensor, noise: Tensor, k: Step) -> Tensor:
    """x_k ~ q(x_k|x_{k+1}), the forward process one step back, [M, ...]; noise standard normal."""
    kept = k.alpha_bar / k.alpha_bar_next
    return kept.sqrt() * x_next + (1 - kept).sqrt() * noise


def eps_from_model_output(
    output: Tensor, x: Tensor, alpha_bar: Tensor, prediction_type: str
) -> Tensor:
    """ε from a network's output: 'epsilon', 'v_prediction' (v = √ᾱ·ε − √(1−ᾱ)·x0) or 'sample' (x0).

    Raises ValueError for any other type.
    """
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return signal * output + noise * x
    if prediction_type == "sample":
        return (x - signal * output) / noise
    raise ValueError(
        f"prediction_type '{prediction_type}' is unknown: use epsilon, v_prediction or sample"
    )
