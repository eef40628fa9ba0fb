"""The seam between the matching loss and the ways to estimate ∇ log F̃."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from .kernels import Step
from .types import NO_SIGNALS, Selection, Signals, Transitions

StepWeight = Literal["one", "std"] | float  # a number p: σ_k to the power of p


@dataclass(frozen=True)
class ReferenceSignals(Signals):
    """output_ref: [M, ...] u_#(x_k), which the loss then need not compute."""

    output_ref: Tensor | None = None


@dataclass(frozen=True)
class Ahead:
    """What an estimator found that needs no u_θ(x_k): nothing. One that finds something has a
    record of its own, which inherits from this one."""


NOTHING_AHEAD = Ahead()


@dataclass(frozen=True)
class Evaluated:
    """M transitions with both models evaluated at x_k, once, for the loss and the estimator.

    x: [M, ...] x_k; requires grad when the estimator asked for it (`needs_input_graph`).
    output: [M, ...] u_θ(x_k) with its graph. output_ref: [M, ...] u_#(x_k); its graph reaches x
    only, and it has none when it came as a signal. ahead: what `Estimator.ahead` found.
    """

    batch: Transitions
    k: Step
    x: Tensor
    output: Tensor
    output_ref: Tensor
    ahead: Ahead = NOTHING_AHEAD


@dataclass(frozen=True)
class Estimate:
    """v̂(x_{k+1}) ≈ ∇ log F̃(x_{k+1}), [M, ...]; terms: the estimator's weighted losses, each [M]."""

    value_gradient: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Estimator(Protocol):
    """A way to estimate the value gradient; it owns what it learns (`modules`).

    One that evaluates the frozen model at x_k in `prepare` hands its output on in
    `ReferenceSignals`, and then must not ask for the input's graph.
    """

    needs_input_graph: bool
    modules: nn.ModuleDict

    def limit_rows(self, rows: int) -> None:
        """`Objective.limit_rows`, for what `prepare` does."""
        return None

    def prepare(self, chosen: Selection) -> Signals:
        """What `__call__` needs of whole trajectories (`Objective.prepare`)."""
        return NO_SIGNALS

    def ahead(self, batch: Transitions, k: Step, x: Tensor, output_ref: Tensor) -> Ahead:
        """What needs no u_θ(x_k), without graphs.

        It is asked for before u_θ(x_k) is evaluated, so that its graphs are gone when that of θ
        comes: one graph of the model at a time. Arguments as in `Evaluated`.
        """
        return NOTHING_AHEAD

    def __call__(self, here: Evaluated) -> Estimate: ...


def step_weight(k: Step, mode: StepWeight) -> Tensor:
    """w_k: 1 (Liu et al. 2025), or σ_k, in which ½Σ‖w_k·residual score‖² is the path's KL, or
    another power of σ_k."""
    if mode == "one":
        return torch.ones_like(k.std)
    return k.std if mode == "std" else k.std**mode


def shortened(value: Tensor, std: Tensor, quantile: float) -> Tensor:
    """v̂ [M, ...] with σ_k‖v̂‖ no longer than its quantile over the M rows; std: σ_k [M, 1, ...]."""
    length = (std * value).flatten(1).norm(dim=1)
    return no_longer(value, length, length.quantile(quantile))


def no_longer(value: Tensor, length: Tensor, longest: Tensor) -> Tensor:
    """value [M, ...], whose rows have these lengths [M], shortened to `longest` [], >= 0."""
    least = torch.finfo(length.dtype).tiny
    factor = longest / torch.maximum(length, longest).clamp(min=least)
    return value * factor.reshape(-1, *[1] * (value.ndim - 1))


def mean_square(value: Tensor) -> Tensor:
    """Elementwise mean of squares per sample: [M, ...] -> [M]."""
    return value.square().flatten(1).mean(1)
