"""How much of a path's weight is known on the way: r of what is predicted of its clean sample.

With the weight h_k(x_k) = E[w|x_k] that is to be expected of a state, the target's step is

    d*(x_k) = E[ (h_j(x_j) − h_k(x_k))·z_k | x_k ] / h_k(x_k),      j > k, z_k the step's own noise

for every j: what the step did to the weight, times its noise (Williams 1992; with a critic: Sutton
& Barto 2018, ch. 13). The end itself, h_N = w, has all that the later steps did on top of it, as
noise; a state soon after has less, and instead the error of what is taken for h:

    h_k ≈ ĥ_k(β·r(x̂_#(x_k)) − log Z),      one curve for each state that is looked at

It is a mean over paths of the pretrained model, by equal shares of them, in straight lines between.
Of z_k only the part is kept along the directions in which ends differ that begin at one state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import kernels
from ..core.kernels import KernelTable

SEEN = (0.02, 0.9)  # shares of the signal between which it is worth while to look
BIN = 100  # paths at least for each point of a curve
LEAST = 0.05  # of an expected weight, to divide by


def looks_at(alpha_bar: Tensor, count: int) -> tuple[int, ...]:
    """`count` levels of [N+1], or fewer, evenly among those with some signal and some noise."""
    low, high = SEEN
    worth = ((alpha_bar > low) & (alpha_bar < high)).nonzero()[:, 0]
    if not count or not len(worth):
        return ()
    count = min(count, len(worth))
    last = len(worth) - 1
    picked = torch.linspace(0, last, count) if count > 1 else torch.tensor([last / 2])
    return tuple(worth[picked.round().long()].tolist())


@dataclass(frozen=True)
class Spans:
    """For each of N steps, which look is the last at or before it (0: none) and which it is judged
    by (len + 1: the end). ahead: how many looks further that is; 0: the end for all."""

    now: tuple[int, ...]
    then: tuple[int, ...]
    until: tuple[int, ...]  # the level of that look

    @staticmethod
    def of(looks: Sequence[int], num_steps: int, ahead: int) -> Spans:
        end = len(looks) + 1
        now = tuple(sum(level <= step for level in looks) for step in range(num_steps))
        then = tuple(min(i + ahead, end) if ahead else end for i in now)
        levels = (0, *looks, num_steps)
        return Spans(now, then, tuple(levels[i] for i in then))


@dataclass(frozen=True)
class ExpectedWeight:
    """y over x, in straight lines, constant outside; x ascending."""

    x: Tensor
    y: Tensor

    @staticmethod
    def fit(score: Tensor, weight: Tensor) -> ExpectedWeight:
        """The mean weight over equal shares of the paths by their score, [n] each.

        Paths of one score count alike, whichever share they are in.
        """
        _, same, count = score.unique(return_inverse=True, return_counts=True)
        total = torch.zeros(len(count), dtype=torch.float64).index_add(0, same, weight.double())
        alike = (total / count)[same]
        shares = score.argsort(stable=True).chunk(max(1, min(64, len(score) // BIN)))
        x = torch.stack([score[share].double().mean() for share in shares])
        return ExpectedWeight(x, torch.stack([alike[share].mean() for share in shares]))

    def at(self, score: Tensor) -> Tensor:
        """[n] float64."""
        if len(self.x) == 1:
            return self.y.expand(len(score))
        s = score.double().clamp(self.x[0], self.x[-1])
        right = torch.searchsorted(self.x, s).clamp(1, len(self.x) - 1)
        gap = (self.x[right] - self.x[right - 1]).clamp(min=1e-12)
        part = (s - self.x[right - 1]) / gap
        return self.y[right - 1] + part * (self.y[right] - self.y[right - 1])


def values(scores: Tensor, weight: Tensor, curves: Sequence[ExpectedWeight]) -> Tensor:
    """Expected weights before any look (1), at each look and at the end (w), [n, looks + 2]."""
    seen = [curve.at(score) for curve, score in zip(curves, scores.unbind(1), strict=True)]
    return torch.stack([torch.ones_like(weight), *seen, weight], 1)


def judged(value: Tensor, log_ratio: Tensor, spans: Spans, own: bool) -> tuple[Tensor, Tensor]:
    """ĥ at each step and at the look it is judged by, [n, N] float32 each.

    own: of paths of the policy. The latter is then times p_#/p_θ of the steps between, log_ratio
    [n, N] being log p_θ/p_#, and both are over the former: those paths have their states from the
    policy, which is the target's if it is done.
    """
    now, then = value[:, list(spans.now)], value[:, list(spans.then)]
    if own:
        until = torch.cat([torch.zeros_like(log_ratio[:, :1]), log_ratio.cumsum(1)], 1)
        between = until[:, list(spans.until)] - until[:, :-1]
        then = then * (-between).exp() / now.clamp(min=LEAST)
        now = torch.ones_like(now)
    return now.float(), then.float()


def directions(x: Tensor, output_ref: Tensor, table: KernelTable, count: int) -> Tensor | None:
    """Orthonormal directions in which ends differ that begin at one state, [N, D, count] float32.

    The principal ones of z̄_k (`kernels.bridge_noise`) over n paths x [n, N+1, ...], n at most.
    None where there are no fewer than D, or `count` is 0.
    """
    size = math.prod(x.shape[2:])
    if not 0 < count < size:
        return None
    count = min(count, len(x))
    found = []
    for step in range(table.num_steps):
        here, output = x[:, step], output_ref[:, step]
        k = table.at_step(step, here)
        seen = kernels.bridge_noise(here, x[:, -1], output, k).flatten(1).double()
        if len(x) > size:
            basis = torch.linalg.eigh(seen.T @ seen).eigenvectors[:, -count:]
        else:
            values, rows = torch.linalg.eigh(seen @ seen.T)
            basis = seen.T @ rows[:, -count:] / values[-count:].clamp(min=1e-300).sqrt()
        found.append(basis.float())
    return torch.stack(found)
