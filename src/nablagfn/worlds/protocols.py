"""What a world is made of: a pretrained model whose posterior is known, and a reward at points.

K components, d dimensions, P prompts, M rows.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..core.schedules import Levels
from .mixture import Posterior


class PointModel(Protocol):
    """A pretrained model of points that lie in K modes: a `Density`, or `LearnedScore`."""

    @property
    def means(self) -> Tensor:
        """[K, d]; pictures mark them."""

    @property
    def weights(self) -> Tensor:
        """[K], positive, sum 1."""

    @property
    def dim(self) -> int:
        """d."""

    def __len__(self) -> int:
        """K."""

    def check(self) -> None:
        """Raises ValueError, one line, when shapes or values do not fit."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> PointModel:
        """The same model there, in that dtype."""

    def posterior(self, x: Tensor, levels: Levels) -> Posterior:
        """E[x_clean|x] and E[noise|x]; x [M, d], levels [M, 1] each, σ above 0."""

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [d] and covariance [d, d]."""

    def mode_of(self, x: Tensor) -> Tensor:
        """The component that each x [M, d] is counted to, [M] in 0..K-1."""


class Density(PointModel, Protocol):
    """A mixture with its exact posterior: `Mixture`, or `ShapedMixture`."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Density:
        """The same density there, in that dtype."""

    def noised(self, alpha: float, sigma: float) -> Density:
        """The distribution of α·x + σ·z."""

    def log_density(self, x: Tensor, levels: Levels) -> Tensor:
        """log p of the noised density in nats; x [M, d], levels [M, 1] each -> [M]."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent draws, [count, d]."""


class PointReward(Protocol):
    """The reward r(x, p) of a world: `Quadratic`, one of `rewards.py`, or your own.

    Where exp(βr) outgrows the tails of the density there is no target: of rewards other than
    `Quadratic` a world does not check that, and bounded ones need no check.
    """

    def check(self, prompts: int, dim: int) -> None:
        """Raises ValueError, one line, unless it is a reward of so many prompts and dimensions."""

    def __call__(self, x: Tensor, prompt: Tensor) -> Tensor:
        """x [M, d], prompt [M] integers in 0..P-1 -> [M], in the dtype of x; differentiable."""

    def gradient(self, x: Tensor, prompt: Tensor) -> Tensor:
        """∇r with respect to x, [M, d]."""
