"""The record that a world file defines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import ConfigError
from ..core.schedules import AngleNoising, LinearNoising, Noising, Prediction
from .mixture import Mixture, Quadratic, require_finite, require_shape, tilted
from .protocols import PointModel, PointReward
from .shaped import ShapedMixture

CLEAN_ANGLE = 0.029  # noise angle arctan(σ/α) of the clean end; Stable Diffusion has the same
NOISY_GAP = 0.02  # the noisiest angle is π/2 less this: x_0 and x_N are nearly independent
COSINE = AngleNoising(last=999, first_angle=CLEAN_ANGLE, gap=NOISY_GAP)
FLOW = LinearNoising(cleanest=math.tan(CLEAN_ANGLE) / (1 + math.tan(CLEAN_ANGLE)))


@dataclass(frozen=True, eq=False)
class ClosedForm:
    """The parts of a world whose tilted density is known in closed form: `mixture.tilted`."""

    mixture: Mixture
    reward: Quadratic


@dataclass(frozen=True, eq=False)
class World:
    """A pretrained model, a reward per prompt, and β: the target is p_pretrained·exp(βr).

    title: one line for plots and tables. prompts: P distinct strings. noising: its forward process;
    prediction: what its network predicts. name: given by `load`. Tensors are CPU float64.
    Raises ValueError when shapes or values do not fit.
    """

    title: str
    mixture: PointModel
    reward: PointReward
    beta: float
    prompts: tuple[str, ...]
    noising: Noising = COSINE
    prediction: Prediction = "epsilon"
    name: str = ""

    def __post_init__(self) -> None:
        self.mixture.check()
        self.reward.check(len(self.prompts), self.mixture.dim)
        if len(set(self.prompts)) < len(self.prompts) or not self.prompts:
            raise ValueError("the prompts must be distinct, and at least one")
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, not {self.beta}")
        self._check_reward()
        self._check_tilt()

    def _check_reward(self) -> None:
        """Raises ValueError unless the reward has a value and a gradient at the first mean."""
        prompt = torch.arange(len(self.prompts))
        x = self.mixture.means[:1].expand(len(prompt), -1)
        require_shape("the values of the reward", self.reward(x, prompt), len(prompt))
        require_shape("reward.gradient", self.reward.gradient(x, prompt), *x.shape)

    def _check_tilt(self) -> None:
        """Raises ValueError when the tilted density has no finite integral, where that is known."""
        closed = self.closed_form
        for prompt in range(len(self.prompts)):
            if closed is not None:
                tilted(closed.mixture, closed.reward, prompt, self.beta)
            elif isinstance(self.reward, Quadratic) and isinstance(self.mixture, ShapedMixture):
                precisions = self.mixture.covariances.inverse()
                require_finite(precisions + self.beta * self.reward.A[prompt], self.beta)

    @property
    def closed_form(self) -> ClosedForm | None:
        """A mixture of one shape and a quadratic reward; None for every other world."""
        if isinstance(self.mixture, Mixture) and isinstance(self.reward, Quadratic):
            return ClosedForm(self.mixture, self.reward)
        return None

    def called(self, name: str) -> World:
        """The same world with its name."""
        return replace(self, name=name)

    @property
    def dim(self) -> int:
        return self.mixture.dim

    def rows(self, prompts: Sequence[str]) -> Tensor:
        """Index of each prompt, [B] int64 in 0..P-1. Raises ConfigError for an unknown one."""
        place = {prompt: i for i, prompt in enumerate(self.prompts)}
        unknown = [prompt for prompt in prompts if prompt not in place]
        if unknown:
            raise ConfigError(
                f"'{unknown[0]}' is no prompt of the world {self.name or self.title}: it knows "
                + ", ".join(f"'{prompt}'" for prompt in self.prompts)
            )
        return torch.tensor([place[prompt] for prompt in prompts], dtype=torch.long)


def ring(modes: int, radius: float, std: float) -> Mixture:
    """`modes` equal Gaussians on a circle in the plane, the first at (radius, 0)."""
    angle = torch.arange(modes, dtype=torch.float64) * (2 * torch.pi / modes)
    return Mixture(
        means=radius * torch.stack([angle.cos(), angle.sin()], 1),
        weights=torch.full((modes,), 1 / modes, dtype=torch.float64),
        variances=torch.full((2,), std**2, dtype=torch.float64),
    )


def vector(*values: float) -> Tensor:
    """A float64 vector; `torch.stack` or [None] makes the [P, d] of a reward from it."""
    return torch.tensor(values, dtype=torch.float64)
