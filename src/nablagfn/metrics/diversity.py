"""How different the samples of one prompt are; means over prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .groups import pair_mean, rows_of


def pairwise_distance(
    features: Tensor, groups: Sequence[object], counts: Tensor | None = None
) -> Tensor:
    """Mean Euclidean distance over all pairs of one group, then over groups; scalar, or [R].

    features: [n, D]; groups: the prompt of each row; counts: [R, n], or weights of any scale. In
    [0, 2] for unit-length features. Raises ValueError when no group has two members.
    """
    return _over_groups(_distances, features, groups, counts)


def variance(features: Tensor, groups: Sequence[object], counts: Tensor | None = None) -> Tensor:
    """Σ_ij ‖e_i − e_j‖²/(2n(n−1)) of each group, then the mean over groups; scalar, or [R].

    The trace of the unbiased covariance; the diversity of Domingo-Enrich et al. 2025 (Adjoint
    Matching, DreamSim features) and of the ∇-GFlowNet paper. In [0, 2] for unit-length features
    ([0, 1] for many samples). Raises ValueError when no group has two members.
    """
    return _over_groups(lambda e: _distances(e).square() / 2, features, groups, counts)


def _distances(e: Tensor) -> Tensor:
    return torch.cdist(e, e, compute_mode="donot_use_mm_for_euclid_dist")


def _over_groups(
    pairs: Callable[[Tensor], Tensor],
    features: Tensor,
    groups: Sequence[object],
    counts: Tensor | None,
) -> Tensor:
    """Per group the mean of `pairs` ([m, D] -> [m, m]), then the mean over groups that have it."""
    taken = torch.ones(1, len(features)) if counts is None else counts
    found = torch.stack(
        [pair_mean(pairs(e), taken[:, rows]) for e, rows in _large_groups(features, groups)]
    )
    means = found.nanmean(0)
    return means[0] if counts is None else means


def _large_groups(features: Tensor, groups: Sequence[object]) -> Iterator[tuple[Tensor, Tensor]]:
    """Features [m, D] float64 and rows [m] of each group with m > 1. Raises ValueError for none."""
    large = [rows for rows in rows_of(groups).values() if len(rows) > 1]
    if not large:
        raise ValueError("diversity needs at least two samples of one prompt")
    for rows in large:
        yield features[rows.to(features.device)].double().cpu(), rows


def vendi(features: Tensor, groups: Sequence[object]) -> Tensor:
    """exp of the entropy of the eigenvalues of K/n, K the cosine kernel; mean over groups, scalar.

    Friedman & Dieng 2023, definition 3.1: the effective number of different samples, from 1 (all
    alike) to the number of samples of a prompt. Raises ValueError when no group has two members.
    """
    return torch.stack([_vendi(e) for e, _ in _large_groups(features, groups)]).mean()


def vendi_influence(features: Tensor, groups: Sequence[object]) -> Tensor:
    """What each sample adds to `vendi`, [n], by leaving it out (jackknife).

    The derivative with respect to its weight is no good here: of few samples each makes its own
    eigenvalue, and the spread comes out at half its size.
    """
    influence = torch.zeros(len(features), dtype=torch.float64)
    large = list(_large_groups(features, groups))
    for e, rows in large:
        m = len(rows)
        without = torch.stack([_vendi(torch.cat([e[:i], e[i + 1 :]])) for i in range(m)])
        influence[rows] = (m - 1) / m * (without.mean() - without) / len(large)
    return influence


def _vendi(e: Tensor) -> Tensor:
    """Compute it for the rows of e [m, D]; the eigenvalues are squared singular values of e/√m."""
    p = torch.linalg.svdvals(F.normalize(e, dim=1) / len(e) ** 0.5).square()
    return (-torch.special.xlogy(p, p)).sum().exp()
