"""Gaussian mixtures whose components have covariances of their own, with their exact posterior.

K components, d dimensions, M rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.schedules import Levels
from .mixture import Posterior, require_shape, require_weights


@dataclass(frozen=True)
class _Split:
    """x − α·μ_k along the axes of each component, the variances there, and log w_k·N_k(x).

    along, variances: [M, K, d]. log_parts: [M, K].
    """

    along: Tensor
    variances: Tensor
    log_parts: Tensor


@dataclass(frozen=True, eq=False)
class ShapedMixture:
    """p(x) = Σ_k w_k N(x; μ_k, C_k), C_k = U_k diag(v_k) U_kᵀ; `of` makes it from the C_k.

    Noise changes the variances along the axes and leaves the axes alone, so the C_k are decomposed
    once. means: [K, d]. weights: [K], positive, sum 1. axes: [K, d, d], the columns of each U_k
    orthonormal. variances: [K, d], positive.
    """

    means: Tensor
    weights: Tensor
    axes: Tensor
    variances: Tensor

    @staticmethod
    def of(means: Tensor, weights: Tensor, covariances: Tensor) -> ShapedMixture:
        """From covariances [K, d, d]. Raises ValueError unless they are symmetric."""
        require_shape("covariances", covariances, *means.shape, means.shape[1])
        if not torch.equal(covariances, covariances.mT):
            raise ValueError("the covariances must be symmetric")
        variances, axes = torch.linalg.eigh(covariances)
        return ShapedMixture(means, weights, axes, variances)

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    def __len__(self) -> int:
        """K, the number of components."""
        return len(self.weights)

    @property
    def covariances(self) -> Tensor:
        """C_k, [K, d, d]."""
        return (self.axes * self.variances[:, None]) @ self.axes.mT

    def check(self) -> None:
        """Raises ValueError, one line, when shapes or values do not fit."""
        count, dim = self.means.shape
        require_weights(self.weights, count)
        require_shape("axes", self.axes, count, dim, dim)
        require_shape("variances", self.variances, count, dim)
        if not bool((self.variances > 0).all()):
            raise ValueError("the variances must be positive: each covariance positive definite")
        unit = torch.eye(dim, dtype=self.axes.dtype)
        if not torch.allclose(self.axes.mT @ self.axes, unit, atol=1e-9):
            raise ValueError("the axes of each component must be orthonormal")

    def to(self, device: torch.device | str, dtype: torch.dtype) -> ShapedMixture:
        """The same mixture there; the axes are rounded, not decomposed again."""
        return ShapedMixture(
            self.means.to(device, dtype),
            self.weights.to(device, dtype),
            self.axes.to(device, dtype),
            self.variances.to(device, dtype),
        )

    def noised(self, alpha: float, sigma: float) -> ShapedMixture:
        """The distribution of α·x + σ·z, again a mixture."""
        variances = alpha**2 * self.variances + sigma**2
        return ShapedMixture(alpha * self.means, self.weights, self.axes, variances)

    def _split(self, x: Tensor, levels: Levels) -> _Split:
        alpha, sigma = levels.alpha[..., None], levels.sigma[..., None]  # [M, 1, 1]
        columns = self.axes.movedim(1, 0).reshape(self.dim, -1)  # [d, K·d]
        centres = (self.means[:, None] @ self.axes)[:, 0]  # U_kᵀμ_k, [K, d]
        along = (x @ columns).unflatten(1, centres.shape) - alpha * centres
        variances = alpha.square() * self.variances + sigma.square()
        normal = (along.square() / variances + (2 * math.pi * variances).log()).sum(-1)
        return _Split(along, variances, self.weights.log() - normal / 2)

    def log_density(self, x: Tensor, levels: Levels) -> Tensor:
        """log p of the noised mixture in nats; x [M, d], levels [M, 1] each -> [M]."""
        return self._split(x, levels).log_parts.logsumexp(1)

    def posterior(self, x: Tensor, levels: Levels) -> Posterior:
        """What x = α·x_clean + σ·noise says of x_clean and of the noise.

        With the posterior probabilities s_k, v'_k = α²·v_k + σ², and y_k = U_kᵀ(x − α·μ_k),

            ε = −σ·∇ log p = Σ_k s_k U_k (σ·y_k/v'_k),   x̂ = Σ_k s_k (μ_k + U_k (α·v_k·y_k/v'_k))

        Neither is computed from the other, so that neither loses digits where σ or α is small.
        x: [M, d]. levels: [M, 1] each, σ above 0.
        """
        split = self._split(x, levels)
        share = split.log_parts.softmax(1)
        pull = share[..., None] * split.along / split.variances  # [M, K, d]
        rows = self.axes.mT.reshape(-1, self.dim)  # [K·d, d]
        return Posterior(
            x_clean=share @ self.means + levels.alpha * ((self.variances * pull).flatten(1) @ rows),
            eps=levels.sigma * (pull.flatten(1) @ rows),
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [d] and covariance [d, d]; of the noised mixture: `noised(α, σ).moments()`."""
        mean = self.weights @ self.means
        away = self.means - mean
        within = (self.weights[:, None, None] * self.covariances).sum(0)
        return mean, (self.weights[:, None] * away).T @ away + within

    def mode_of(self, x: Tensor) -> Tensor:
        """Index of the most probable component, x [M, d] -> [M] in 0..K-1.

        Not of the nearest mean: a long component reaches past the means of its neighbours.
        """
        one = torch.ones(len(x), 1, device=x.device, dtype=x.dtype)
        here = self.to(x.device, x.dtype)
        return here._split(x, Levels(one, 0 * one)).log_parts.argmax(1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent draws, [count, d]."""
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.dim, generator=generator, dtype=self.means.dtype)
        return self.means[k] + (self.axes[k] @ (self.variances[k].sqrt() * z)[..., None])[..., 0]
