"""Gaussian mixtures of one shape with their exact posterior, quadratic rewards, their tilt.

K components, d dimensions, P prompts, M rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.schedules import Levels


@dataclass(frozen=True)
class Posterior:
    """E[x_clean|x] and E[noise|x], [M, d] each."""

    x_clean: Tensor
    eps: Tensor


def require_shape(what: str, value: Tensor, *shape: int) -> None:
    """Raises ValueError, one line that names `what`, unless the tensor has that shape."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{what} must have the shape {shape}, not {tuple(value.shape)}")


def require_weights(weights: Tensor, count: int) -> None:
    """Raises ValueError unless there are `count` weights [K], positive and with the sum 1."""
    require_shape("weights", weights, count)
    if not (bool((weights > 0).all()) and abs(float(weights.sum()) - 1) < 1e-9):
        raise ValueError("the weights must be positive and sum to 1")


@dataclass(frozen=True, eq=False)
class Mixture:
    """p(x) = Σ_k w_k N(x; μ_k, diag(v)); all components share the variances v. K = 1: a Gaussian.

    means: [K, d]. weights: [K], positive, sum 1. variances: [d], positive.
    """

    means: Tensor
    weights: Tensor
    variances: Tensor

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    def __len__(self) -> int:
        """K, the number of components."""
        return len(self.weights)

    def check(self) -> None:
        """Raises ValueError, one line, when shapes or values do not fit."""
        count, dim = self.means.shape
        require_weights(self.weights, count)
        require_shape("variances", self.variances, dim)
        if not bool((self.variances > 0).all()):
            raise ValueError("the variances must be positive")

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Mixture:
        return Mixture(
            self.means.to(device, dtype),
            self.weights.to(device, dtype),
            self.variances.to(device, dtype),
        )

    def noised(self, alpha: float, sigma: float) -> Mixture:
        """The distribution of α·x + σ·z, again a mixture."""
        return Mixture(alpha * self.means, self.weights, alpha**2 * self.variances + sigma**2)

    def log_density(self, x: Tensor, levels: Levels) -> Tensor:
        """log p of the noised mixture in nats; x [M, d], levels [M, 1] each -> [M]."""
        alpha, sigma = levels.alpha, levels.sigma
        variance = alpha.square() * self.variances + sigma.square()
        away = x[:, None] - alpha[..., None] * self.means
        normal = (away.square() / variance[:, None]).sum(-1) + (2 * math.pi * variance).log().sum(
            -1, keepdim=True
        )
        return (self.weights.log() - normal / 2).logsumexp(1)

    def posterior(self, x: Tensor, levels: Levels) -> Posterior:
        """What x = α·x_clean + σ·noise says of x_clean and of the noise.

        With m = Σ_k s_k(x) μ_k, the posterior probabilities s_k, and v' = α²·v + σ²,

            ε = −σ·∇ log p = σ·(x − α·m)/v',   x̂ = (α·v·x + σ²·m)/v'

        The hot loop of every world: the squares are multiplied out, so that no [M, K, d] appears.
        x: [M, d]. levels: [M, 1] each, σ above 0.
        """
        alpha, sigma = levels.alpha, levels.sigma
        variance = alpha.square() * self.variances + sigma.square()
        mean = self.means
        if len(self) > 1:
            across = (alpha * x / variance) @ self.means.T
            own = (alpha.square() / variance) @ self.means.square().T
            mean = (self.weights.log() + across - own / 2).softmax(1) @ self.means
        return Posterior(
            x_clean=(alpha * self.variances * x + sigma.square() * mean) / variance,
            eps=sigma * (x - alpha * mean) / variance,
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [d] and covariance [d, d]; of the noised mixture: `noised(α, σ).moments()`."""
        mean = self.weights @ self.means
        away = self.means - mean
        return mean, (self.weights[:, None] * away).T @ away + self.variances.diag()

    def mode_of(self, x: Tensor) -> Tensor:
        """Index of the nearest component mean, x [M, d] -> [M] in 0..K-1."""
        return torch.cdist(x, self.means.to(x.device, x.dtype)).argmin(1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent draws, [count, d]."""
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.dim, generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.variances.sqrt() * z


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The reward r(x, p) = b_pᵀx − ½·xᵀA_p x of prompt p.

    b: [P, d]. A: [P, d, d], symmetric; zero for a linear reward.
    """

    b: Tensor
    A: Tensor

    @staticmethod
    def linear(b: Tensor) -> Quadratic:
        """r(x, p) = b_pᵀx; b [P, d]."""
        return Quadratic(b, b.new_zeros(*b.shape, b.shape[1]))

    def check(self, prompts: int, dim: int) -> None:
        """Raises ValueError, one line, unless it is a reward of so many prompts and dimensions."""
        require_shape("reward.b", self.b, prompts, dim)
        require_shape("reward.A", self.A, prompts, dim, dim)
        if not torch.equal(self.A, self.A.mT):
            raise ValueError("reward.A must be symmetric")

    def __call__(self, x: Tensor, prompt: Tensor) -> Tensor:
        """x [M, d], prompt [M] integers in 0..P-1 -> [M], in the dtype of x; differentiable."""
        b, A = self.b.to(x.device, x.dtype)[prompt], self.A.to(x.device, x.dtype)[prompt]
        return (x * (b - (A @ x[..., None])[..., 0] / 2)).sum(1)

    def gradient(self, x: Tensor, prompt: Tensor) -> Tensor:
        """∇r = b_p − A_p x, [M, d]."""
        b, A = self.b.to(x.device, x.dtype)[prompt], self.A.to(x.device, x.dtype)[prompt]
        return b - (A @ x[..., None])[..., 0]


@dataclass(frozen=True, eq=False)
class Tilted:
    """Gaussians of one full covariance: weights [K], means [K, d], covariance [d, d].

    The components of a tilted `Mixture` share it, as they shared the variances.
    """

    weights: Tensor
    means: Tensor
    covariance: Tensor

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [d] and covariance [d, d] of the whole."""
        mean = self.weights @ self.means
        away = self.means - mean
        return mean, (self.weights[:, None] * away).T @ away + self.covariance

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent draws, [count, d]."""
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + z @ torch.linalg.cholesky(self.covariance).T


def require_finite(precisions: Tensor, beta: float) -> Tensor:
    """The Cholesky factors of the precisions [..., d, d] of a density tilted at β.

    Raises ValueError when one is not positive definite: the density has no finite integral.
    """
    factor, failed = torch.linalg.cholesky_ex(precisions)
    if bool(failed.any()):
        raise ValueError(f"p·exp(βr) has no finite integral at β = {beta}: lower β")
    return factor


def tilted(mixture: Mixture, reward: Quadratic, prompt: int, beta: float) -> Tilted:
    """p(x)·exp(β·r(x, prompt))/Z in closed form, by completing the square in each component.

    Λ = diag(1/v) + βA, μ'_k = Λ⁻¹(μ_k/v + βb), w'_k ∝ w_k·exp(½ μ'_kᵀΛμ'_k − ½ μ_kᵀ(μ_k/v)).
    Raises ValueError when Λ is not positive definite: the tilted density has no finite integral.
    """
    b, A = reward.b[prompt].to(mixture.means), reward.A[prompt].to(mixture.means)
    precision = (1 / mixture.variances).diag() + beta * A
    factor = require_finite(precision, beta)
    covariance = torch.cholesky_inverse(factor)
    pull = mixture.means / mixture.variances + beta * b
    means = pull @ covariance
    before = (mixture.means.square() / mixture.variances).sum(1)
    log_weights = mixture.weights.log() + ((pull * means).sum(1) - before) / 2
    return Tilted(log_weights.softmax(0), means, covariance)
