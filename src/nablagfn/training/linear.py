"""Where a straight line through the finished samples says that the weight grows.

The reward's own gradient is a poor guide at noisy states: what is decoded there lies between
pictures, and at finished ones the gradient knows nothing of other modes. A linear fit of the reward
over the pool's finished samples is smooth, and what is expected of it is known:

    r(x_N) ≈ a·x_N + const,      E_#[a·x_N | x_k] = a·x̂_#(x_k)

The weight that is to be expected of a state is taken for a function of that score, and the step is
along its gradient, which is exact for linear rewards and normal posteriors:

    log ĥ_k = c0 + c1 s + c2 s²,   s = β a·x̂_#(x_k) − log Z      (the c of greatest Σ w log ĥ − ĥ)
    d*(x_k) ≈ m_k σ_k (c1 + 2 c2 s) β J_x̂ᵀ a

m_k, its length, is measured on the paths' own noise z_k. With g the direction without m_k

    m_k = E[ (ĥ_{k+2} − ĥ_k) z_k·g ] / E[ ĥ_k‖g‖² ] / (1 − R)

R: the share of the reward's variance within a prompt that the first state tells already. A sampler
draws it from a normal distribution, and no policy changes that, so that the steps have to make up
for it: for normal samples the ends have the target's mean then, and its distribution.

No gradient of the reward is needed. What is left is a regression without noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core import kernels
from ..core.kernels import KernelTable
from ..core.types import Judged
from .draws import Draw, Tensors

RIDGES = torch.logspace(-6, 3, 37, dtype=torch.float64)  # of the mean square singular value
ROUNDS = 40  # of Newton's method, which needs about 10
LARGEST = 8.0  # of |log ĥ|
AHEAD = 2  # steps to the state by which a length is measured
LONGEST = 1.2  # m_k at most: above 1 it is mostly chance


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
    """score: [n, K] a·x̂_#(x_k) of n paths' first K states; gradient: [n, K, ...] J_x̂ᵀ a there."""

    score: Tensor
    gradient: Tensor

    def padded(self, draw: Draw) -> Draw:
        """The paths with these gradients, 0 where there are none."""
        found = torch.zeros_like(draw.output_ref)
        found[:, : self.score.shape[1]] = self.gradient
        return replace(draw, gradient=found)


@dataclass(frozen=True)
class Course:
    """What is needed of a field for each β. score: [n, K]. along: [n, K] z_k·σ_k J_x̂ᵀ a; square:
    [n, K] the square of the length of the latter's second factor. told: R, in 0..1."""

    score: Tensor
    along: Tensor
    square: Tensor
    told: float

    @staticmethod
    def of(draw: Draw, field: Field, table: KernelTable) -> Course:
        along, square = [], []
        for step in range(field.score.shape[1]):
            x = draw.x[:, step]
            k = table.at_step(step, x)
            noise = kernels.step_noise(x, draw.x[:, step + 1], draw.output_ref[:, step], k)
            aim = (k.std * field.gradient[:, step]).flatten(1).double()
            along.append((noise.flatten(1) * aim).sum(1))
            square.append(aim.square().sum(1))
        told = shared_variance(field.score[:, 0], draw.reward, draw.slot)
        return Course(field.score.double(), torch.stack(along, 1), torch.stack(square, 1), told)

    def judged(self, weight: Tensor, log_z: Tensor, beta: float, num_steps: int) -> Judged:
        """ĥ_k and ĥ_k m_k (c1 + 2 c2 s) of each path and step, [n, N]; 0 beyond the field.

        weight, log_z: [n] float64, of the path and of its prompt.
        """
        steps, given = self.score.shape[1], 1 - self.told
        curves = [LogQuadratic.fit(beta * self.score[:, k] - log_z, weight) for k in range(steps)]
        value = torch.stack([curve.value for curve in curves] + [weight] * AHEAD, 1)
        now = weight[:, None].repeat(1, num_steps)
        end = torch.zeros_like(now)
        for k, curve in enumerate(curves):
            gained = ((value[:, k + AHEAD] - curve.value) * curve.slope * self.along[:, k]).mean()
            paid = beta * (curve.value * (curve.slope * curve.slope) * self.square[:, k]).mean()
            length = float((gained / paid.clamp(min=1e-30)).clamp(0, LONGEST)) / given
            now[:, k] = curve.value
            end[:, k] = curve.value * curve.slope * length
        return Judged(now.float(), now.float(), end.float(), None)


def shared_variance(a: Tensor, b: Tensor, slot: Tensor) -> float:
    """The squared correlation of a and b [n] within the paths of each slot [n], less what chance
    alone gives; 0..0.9."""
    count = slot.bincount().clamp(min=1)

    def centred(value: Tensor) -> Tensor:
        value = value.double()
        return value - (value.new_zeros(len(count)).index_add(0, slot, value) / count)[slot]

    a, b = centred(a), centred(b)
    total = float(a.square().sum() * b.square().sum())
    found = float((a * b).sum()) ** 2 / total if total > 0 else 0.0
    chance = 1 / max(1, len(slot) - len(count))
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
