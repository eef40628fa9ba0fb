"""Samples by group (their prompt), and means over pairs of distinct samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of(groups: Sequence[object]) -> dict[object, Tensor]:
    """The rows of each group, [its size] int64, groups in the order of first appearance."""
    rows: dict[object, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return {group: torch.tensor(own) for group, own in rows.items()}


def pair_mean(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of values[i, j] over ordered pairs i ≠ j, row i taken counts[r, i] times, [R].

    values: [n, n]; its diagonal, a sample beside itself, never counts, however often the sample
    was taken. counts: [R, n], ≥ 0. NaN where fewer than two distinct rows are taken.
    """
    off = values.double() - values.double().diagonal().diag_embed()
    c = counts.double()
    pairs = c.sum(1).square() - c.square().sum(1)
    found = ((c @ off) * c).sum(1) / pairs
    return torch.where((c > 0).sum(1) > 1, found, torch.nan)
