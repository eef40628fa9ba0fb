"""Bootstrap intervals: samples are drawn anew within each prompt; the prompts stay.

So an interval says what other noise would have given for these prompts, not what other prompts
would have given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .groups import rows_of

NEAR_ZERO = 10


@dataclass(frozen=True)
class Interval:
    """A figure, and the ends of its interval; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


def resampled_counts(
    groups: Sequence[object], resamples: int, generator: torch.Generator
) -> Tensor:
    """How often each sample is taken in each of R resamples, [R, n] float64.

    Of each group of m samples m − 1 are drawn with replacement and weigh m/(m−1) each: so the
    spread of a group's mean has the right size for small m, too (Rao & Wu 1988). A group of one
    stays as it is.
    """
    counts = torch.ones(resamples, len(groups), dtype=torch.float64)
    for rows in rows_of(groups).values():
        m = len(rows)
        if m > 1:
            drawn = torch.randint(m, (resamples, m - 1), generator=generator)
            own = torch.zeros(resamples, m, dtype=torch.float64)
            own.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
            counts[:, rows] = own * (m / (m - 1))
    return counts


def resampled_mean(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of values [n] in each resample, [R]."""
    return counts @ values.double() / counts.sum(1)


def percentile(value: float, resampled: Tensor, confidence: float) -> Interval:
    """The percentile interval (Efron 1979) of a figure from its resampled values [R].

    NaNs (resamples without a pair) are left out; no ends when nothing is left or value is NaN.
    """
    known = resampled[resampled.isfinite()]
    if not len(known) or not math.isfinite(value):
        return Interval(value)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(known, torch.tensor([tail, 1 - tail], dtype=known.dtype)).tolist()
    return Interval(value, low, high)


def basic(value: float, resampled: Tensor, confidence: float) -> Interval:
    """The basic interval 2·value − percentiles (Davison & Hinkley 1997, §2.4), from values [R].

    For figures that few samples put too low or too high: resamples are off in the same direction
    once more, and this turns it round. `value` itself may then lie outside. Else as `percentile`.
    """
    found = percentile(value, resampled, confidence)
    if found.low is None or found.high is None:
        return found
    return Interval(value, 2 * value - found.high, 2 * value - found.low)


def basic_of_log(value: float, resampled: Tensor, confidence: float) -> Interval:
    """`basic` of the logarithm: for a figure that is positive, and whose spread grows with it.

    Where resamples come near 0 (below value/NEAR_ZERO) a logarithm would turn them into a bound of
    any size: there `percentile`.
    """
    plain = percentile(value, resampled, confidence)
    if plain.low is None or plain.high is None or plain.low < value / NEAR_ZERO or value <= 0:
        return plain
    return Interval(value, value**2 / plain.high, value**2 / plain.low)
