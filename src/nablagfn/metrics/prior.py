"""Distance between samples of two models, mostly finetuned and pretrained.

x [n, D] of the one, y [m, D] of the other. *Paired* figures take n = m and rows drawn from the
same prompt and noise: x_i and y_i may depend on each other, pairs (x_i, y_i) may not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .groups import pair_mean, rows_of

# ------------------------------------------------------------------------------ Fréchet


def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    """‖μ_x − μ_y‖² + tr Σ_x + tr Σ_y − 2 tr(Σ_xΣ_y)^½, a scalar ≥ 0 (Heusel et al. 2017, eq. 6).

    With centred rows X, Y and Σ = XᵀX/(n−1), the last trace is the nuclear norm of
    XYᵀ/√((n−1)(m−1)): exact also for n ≪ D, where Σ is singular. n, m ≥ 2. Biased upwards for
    independent samples, the more the smaller n: compare equal n only.
    """
    x, y = x.double(), y.double()
    X, Y = _centred(x), _centred(y)
    _, s, _ = _between(X, Y)
    spread = X.square().sum() + Y.square().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + spread - 2 * s.sum()).clamp(min=0)


def frechet_influence(x: Tensor, y: Tensor) -> Tensor:
    """What each pair (x_i, y_i) adds to `frechet_distance`, [n], from the derivative with respect
    to its weight; that of the nuclear norm is half of (USUᵀ + VSVᵀ)_ii. Paired."""
    x, y = x.double(), y.double()
    X, Y = _centred(x), _centred(y)
    U, s, V = _between(X, Y)
    towards = (X * (len(x) - 1) ** 0.5 - Y * (len(y) - 1) ** 0.5) @ (x.mean(0) - y.mean(0))
    spread = X.square().sum(1) + Y.square().sum(1)
    influence = 2 * towards / len(x) + spread - (U.square() + V.square()) @ s
    return influence - influence.mean()


def _centred(x: Tensor) -> Tensor:
    """X with Σ = XᵀX."""
    return (x - x.mean(0)) / (len(x) - 1) ** 0.5


def _between(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [n, r], s [r], V [m, r] of XYᵀ, by way of the smaller of n and D."""
    (P, A), (Q, B) = torch.linalg.qr(X), torch.linalg.qr(Y)
    U, s, Vh = torch.linalg.svd(A @ B.mT, full_matrices=False)
    return P @ U, s, Q @ Vh.mT


def frechet_per_prompt(x: Tensor, y: Tensor, groups: Sequence[object]) -> Tensor:
    """Mean over prompts of `frechet_distance` between the samples of one prompt, a scalar ≥ 0.

    groups: the prompt of each row of both. As the ∇-GFlowNet paper evaluates: pooling would count
    the differences between prompts as spread. Raises ValueError for a prompt with one sample.
    """
    found = [frechet_distance(x[rows], y[rows]) for rows in _prompts(groups)]
    return torch.stack(found).mean()


def frechet_per_prompt_influence(x: Tensor, y: Tensor, groups: Sequence[object]) -> Tensor:
    """What each pair adds to `frechet_per_prompt`, [n]. Paired."""
    influence = torch.zeros(len(x), dtype=torch.float64)
    prompts = _prompts(groups)
    for rows in prompts:
        influence[rows] = frechet_influence(x[rows], y[rows]) / len(prompts)
    return influence


def _prompts(groups: Sequence[object]) -> list[Tensor]:
    prompts = list(rows_of(groups).values())
    if min(map(len, prompts)) < 2:
        raise ValueError("a Fréchet distance per prompt needs two samples of each")
    return prompts


# ------------------------------------------------------------------------------ kernels

Kernel = Callable[[Tensor, Tensor], Tensor]  # [n, D], [m, D] -> [n, m]


def polynomial(a: Tensor, b: Tensor) -> Tensor:
    """(aᵀb/D + 1)³, the kernel of the KID (Bińkowski et al. 2018, eq. 4). [n, m]."""
    return (a @ b.mT / a.shape[1] + 1) ** 3


def rbf(widths: Sequence[float]) -> Kernel:
    """k(a, b) = mean over widths w of exp(−‖a − b‖²/(2w²)), in [0, 1]."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return _rbf_of_distance(torch.cdist(a, b), widths)

    return kernel


def _rbf_of_distance(distance: Tensor, widths: Sequence[float]) -> Tensor:
    """The kernel at given distances, of their shape."""
    square = distance.square()
    total = torch.zeros_like(square)
    for w in widths:
        total += (square / (-2 * w**2)).exp_()
    return total / len(widths)


def rbf_widths(y: Tensor) -> tuple[float, ...]:
    """¼, ½ and 1 times the median distance between rows of y [m, D] (Gretton et al. 2012, §8)."""
    median = float(torch.pdist(y.double()).median())
    return (median / 4, median / 2, median)


def mmd2(x: Tensor, y: Tensor, widths: Sequence[float], *, unbiased: bool = False) -> Tensor:
    """Squared maximum mean discrepancy, a scalar: mean k(x,x') + mean k(y,y') − 2·mean k(x,y).

    k is `rbf(widths)`, so values lie in [0, 2]. By default the V-statistic: pairs of a row with
    itself count, so it is ≥ 0 and two samples of one distribution give about
    (1 − E k)·(1/n + 1/m). `unbiased`: the U-statistic without those pairs, about 0 then and at
    times below (Gretton et al. 2012, eq. 3 and 5). For independent samples; n, m ≥ 2.
    """
    own, other = (kernel_within(a.double(), widths, unbiased) for a in (x, y))
    return own + other - 2 * kernel_across(x.double(), y.double(), widths)


def kernel_across(x: Tensor, y: Tensor, widths: Sequence[float]) -> Tensor:
    """Mean of k over pairs of a row of x [n, D] and one of y [m, D], a scalar."""
    return _rbf_of_distance(torch.cdist(x, y), widths).mean()


def kernel_within(a: Tensor, widths: Sequence[float], unbiased: bool = False) -> Tensor:
    """Mean of k over pairs of rows of one sample [n, D]; k of a row with itself is 1."""
    pairs = _rbf_of_distance(torch.pdist(a), widths).mean()
    return pairs if unbiased else (1 + (len(a) - 1) * pairs) / len(a)


def paired_mmd2(
    x: Tensor,
    y: Tensor,
    kernel: Kernel,
    groups: Sequence[object] | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Mean over i ≠ j of k(x_i,x_j) + k(y_i,y_j) − k(x_i,y_j) − k(x_j,y_i); scalar, or [R].

    Gretton et al. 2012, eq. 4: unbiased whether x_i and y_i depend on each other or not, where
    eq. 3 is not (with the same noise it falls below 0); 0 exactly for x = y. x, y: [n, D], n ≥ 2.
    groups: the prompt of each row. The two distributions are then mixtures of the prompts in equal
    parts, and pairs are averaged for each two prompts before all: taken together, pairs of one
    prompt, which are the most alike, would count too little, and still less in a resample.
    """
    x, y = x.double(), y.double()
    across = kernel(x, y)
    values = (kernel(x, x) + kernel(y, y) - across - across.mT).cpu()
    taken = torch.ones(1, len(x)) if counts is None else counts
    found = _mean_over_blocks(
        values, taken.double(), list(rows_of(groups or [0] * len(x)).values())
    )
    return found[0] if counts is None else found


def _mean_over_blocks(values: Tensor, counts: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Mean over all G² ordered pairs of prompts of the mean of values [n, n] in their block, [R].

    Blocks of one prompt leave its diagonal out, and those without a pair are left out.
    """
    share = torch.zeros_like(counts)
    apart, within = values.clone(), []
    for rows in prompts:
        share[:, rows] = counts[:, rows] / counts[:, rows].sum(1, keepdim=True)
        block = values[rows][:, rows]
        within.append(pair_mean(block, counts[:, rows]))
        apart[rows[:, None], rows] = 0.0
    between = ((share @ apart) * share).sum(1)
    G = len(prompts)
    return (between + G * torch.stack(within).nanmean(0)) / G**2


def kid(
    x: Tensor,
    y: Tensor,
    groups: Sequence[object] | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Kernel inception distance, paired: MMD² with `polynomial` (Bińkowski et al. 2018).

    Any sign, mean 0 for equal distributions. Scalar, or [R]. Features are those given: only with
    Inception's is it comparable with published values.
    """
    return paired_mmd2(x, y, polynomial, groups, counts)


def mmd(
    x: Tensor,
    y: Tensor,
    groups: Sequence[object] | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """MMD² with RBF kernels as wide as y is (`rbf_widths`), paired; at most 2. Scalar, or [R]."""
    return paired_mmd2(x, y, rbf(rbf_widths(y)), groups, counts)
