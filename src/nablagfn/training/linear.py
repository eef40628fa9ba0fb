"""Where a straight line through the finished samples says that the weight grows.

The reward's own gradient is a poor guide at noisy states: what is decoded there lies between
pictures, and at finished ones the gradient knows nothing of other modes. A linear fit of the reward
over the pool's finished samples is smooth, and what is expected of it is known:

    r(x_N) ≈ a·x_N + const,      E_#[a·x_N | x_k] = a·x̂_#(x_k)

The weight that is to be expected of a state is taken for a function of that score:

    log ĥ_k = c0 + c1 s + c2 s²,   s = β a·(x̂_#(x_k) − its mean over the prompt's paths)

with the c of greatest Σ w log ĥ − ĥ. (s against log Z, which a few paths know badly, would make the
curve too flat, as errors in what a curve is fitted over do.)

The target's step is σ_k E[∇h(x_{k+1})|x_k]/h(x_k) (Stein's identity), the mean over a step's noise
of the gradient where it ends. So each path's own next state tells it, and what is aimed at is

    ĥ_{k+1} (c1 + 2 c2 s_{k+1}) cap(σ_k β J_x̂(x_{k+1})ᵀ a) / (1 − R)

R: the share of the reward's variance within a prompt that the first state tells already. Where no
policy changes how that is drawn the steps have to make up for it: for normal samples the ends have
the target's mean then, and its distribution. With `pool.shift_start` the first state is one more
end, of a step that begins nowhere: its mean becomes s² E[ĥ_0 (c1 + 2 c2 s_0) β J_x̂(x_0)ᵀ a], one
for all prompts, and R is 0.

No gradient of the reward is needed, and no noise is in what is left but that of one step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.types import Judged
from .draws import Draw, Tensors

RIDGES = torch.logspace(-6, 3, 37, dtype=torch.float64)  # of the mean square singular value
ROUNDS = 40  # of Newton's method, which needs about 10
LARGEST = 8.0  # of |log ĥ|


@dataclass(frozen=True)
class LinearReward:
    """a, of the shape of a sample, and the share of the reward's variance that it explains, left
    one out."""

    slope: Tensor
    explained: float

    @staticmethod
    def fit(x: Tensor, reward: Tensor) -> LinearReward:
        """Ridge regression over finished samples x [n, ...] and rewards [n], n ≥ 2, with the
        penalty of the least error when each sample is left out (Allen's PRESS)."""
        flat, y = x.flatten(1).double(), reward.double()
        y = y - y.mean()
        u, s, v = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        along, total = u.T @ y, float(y.square().mean())
        penalties = RIDGES * s.square().mean().clamp(min=1e-30)
        shrunk = s.square() / (s.square() + penalties[:, None])  # [penalties, directions]
        wrong = y - (shrunk * along) @ u.T
        leverage = (shrunk @ u.square().T + 1 / len(y)).clamp(max=1 - 1e-9)
        errors = (wrong / (1 - leverage)).square().mean(1)
        best = int(errors.argmin())
        slope = v.T @ (along * s / (s.square() + penalties[best]))
        explained = 1 - float(errors[best]) / total if total > 0 else 0.0
        return LinearReward(slope.reshape(x.shape[1:]).float(), explained)


@dataclass(frozen=True)
class Field(Tensors):
    """Of n paths: score [n, K + 1] a·x̂_#(x_k) of the first K + 1 states; gradient [n, K, ...]
    J_x̂ᵀ a where the first K steps end. At a path's end it is x_N itself in place of x̂. first: [n,
    ...] J_x̂ᵀ a at the first state, or [n, 0]."""

    score: Tensor
    gradient: Tensor
    first: Tensor

    def padded(self, draw: Draw) -> Draw:
        """The paths with these gradients, 0 where there are none."""
        found = torch.zeros_like(draw.output_ref)
        found[:, : self.gradient.shape[1]] = self.gradient
        return replace(draw, gradient=found)


@dataclass(frozen=True)
class Course:
    """What is needed of a field for each β. score: [n, K + 1], centred within a prompt. first: [n,
    ...] as the field's. told: R, in 0..1; 0 where the first state is shifted."""

    score: Tensor
    first: Tensor
    told: float

    @staticmethod
    def of(draw: Draw, field: Field) -> Course:
        score = centred(field.score.double(), draw.slot)
        shifted = field.first.numel() > 0
        told = 0.0 if shifted else shared_variance(score[:, 0], draw.reward, draw.slot)
        return Course(score, field.first, told)

    def judged(self, weight: Tensor, beta: float, num_steps: int) -> Judged:
        """ĥ_{k+1} and ĥ_{k+1} (c1 + 2 c2 s_{k+1})/(1 − R) of each path and step, [n, N]; w and 0
        beyond the field. weight: [n] float64, of the paths."""
        now = weight[:, None].repeat(1, num_steps)
        end = torch.zeros_like(now)
        for step in range(self.score.shape[1] - 1):
            curve = LogQuadratic.fit(beta * self.score[:, step + 1], weight)
            now[:, step] = curve.value
            end[:, step] = curve.value * curve.slope / (1 - self.told)
        return Judged(now.float(), now.float(), end.float(), None)

    def start(self, weight: Tensor, beta: float, std: float) -> Tensor:
        """s² E[ĥ_0 (c1 + 2 c2 s_0) β J_x̂(x_0)ᵀ a], the mean of the first state, [...].

        std: s, of the first state. By Stein's identity it is E[ĥ_0 x_0], its mean in the target.
        """
        curve = LogQuadratic.fit(beta * self.score[:, 0], weight)
        slope = std**2 * beta * curve.value * curve.slope
        mean = torch.tensordot(slope, self.first.double(), 1) / len(slope)
        return mean.float()


def centred(value: Tensor, slot: Tensor) -> Tensor:
    """value [n, ...] less its mean over the paths of each slot [n]."""
    count = slot.bincount().clamp(min=1).to(value.dtype)
    total = value.new_zeros(len(count), *value.shape[1:]).index_add(0, slot, value)
    return value - (total / count.reshape(-1, *[1] * (value.ndim - 1)))[slot]


def shared_variance(a: Tensor, b: Tensor, slot: Tensor) -> float:
    """The squared correlation of a and b [n] within the paths of each slot [n], less what chance
    alone gives; 0..0.9."""
    a, b = centred(a.double(), slot), centred(b.double(), slot)
    total = float(a.square().sum() * b.square().sum())
    found = float((a * b).sum()) ** 2 / total if total > 0 else 0.0
    chance = 1 / max(1, len(slot) - int(slot.max()) - 1)
    return min(max((found - chance) / (1 - chance), 0.0), 0.9) if chance < 1 else 0.0


@dataclass(frozen=True)
class LogQuadratic:
    """ĥ and d log ĥ/ds at the scores that it was fitted to, [n] each."""

    value: Tensor
    slope: Tensor

    @staticmethod
    def fit(score: Tensor, weight: Tensor) -> LogQuadratic:
        """The c of greatest mean(w log ĥ − ĥ), by Newton's method; score, weight [n] float64."""
        powers = torch.stack([score**power for power in range(3)], 1)
        c = torch.zeros(3, dtype=torch.float64)
        for _ in range(ROUNDS):
            value = (powers @ c).clamp(-LARGEST, LARGEST).exp()
            curvature = (powers * value[:, None]).T @ powers / len(score)
            curvature += 1e-9 * curvature.diagonal().mean() * torch.eye(3, dtype=torch.float64)
            c = c + torch.linalg.solve(curvature, powers.T @ (weight - value) / len(score)).clamp(
                -1, 1
            )
        value = (powers @ c).clamp(-LARGEST, LARGEST).exp()
        return LogQuadratic(value, c[1] + 2 * c[2] * score)
