"""One update done as the published code does it, in turns with ours: the ratio.

The published work per transition is three passes of the U-Net forward, five back and two decodes
with gradient (docs/performance.md). Here each gradient of residual ∇-DB is taken by a backward pass
of its own, four transitions at a time; the numbers are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nablagfn import kernels
from nablagfn.estimators.residual_db import ResidualDB, reverse_cotangent
from nablagfn.lookahead import row_attenuation
from nablagfn.trainer import Trainer
from nablagfn.types import Selection
from nablagfn.value_gradient import Evaluated

from .child import Case, Setup
from .subject import Stopwatch, paths, peak, reset, trainer_of, warm_up

TURNS = 3


class Unmerged(ResidualDB):
    """Residual ∇-DB whose two gradients at x_k come by two backward passes through ε_θ(x_k)."""

    def reverse_target(self, here: Evaluated) -> Tensor:
        """∇_{x_k}[log p_θ − s·log p_#](x_{k+1}|x_k) + β·γ·∇r(x̂_θ(x_k)), detached, [M, ...]."""
        batch, k = here.batch, here.k
        m = kernels.mean(here.x, here.eps, k)
        cotangent = reverse_cotangent(batch.x_next, m, k)
        (score,) = torch.autograd.grad(m, here.x, cotangent, retain_graph=True)
        x_clean = kernels.predict_clean(here.x, here.eps, k.alpha_bar)
        value = self.log_reward(x_clean, batch.condition)
        gamma = row_attenuation(k.alpha_bar, self.mode, value)
        (slope,) = torch.autograd.grad(value, here.x, gamma, retain_graph=True)
        return score + slope - self.strength * here.ahead["score_ref"]


@contextmanager
def unmerged(trainer: Trainer) -> Iterator[None]:
    """Inside it the trainer's objective makes the published code's passes."""
    objective: Any = trainer.objective
    own: ResidualDB = objective.estimator
    objective.estimator = Unmerged(
        own.policy,
        own.log_reward,
        own.mode,
        own.flow,
        reverse_scale=own.reverse_scale,
        strength=own.strength,
    )
    try:
        yield
    finally:
        objective.estimator = own


@dataclass(frozen=True)
class Kind:
    """A way to learn from the same transitions, `rows` at a time."""

    name: str
    rows: int
    merged: bool


KINDS = (
    Kind("published", 4, merged=False),
    Kind("ours", 4, merged=True),
    Kind("ours, micro_batch=24", 24, merged=True),
)


@dataclass(frozen=True)
class Learned:
    """Seconds, peak bytes, loss and gradient norm of learning once from an update's transitions."""

    seconds: float
    peak: int
    loss: float
    norm: float


def learn(trainer: Trainer, chosen: Selection, kind: Kind) -> Learned:
    """The update's gradients, without the optimizer's step."""
    device = trainer.policy.device
    with nullcontext() if kind.merged else unmerged(trainer):
        reset(device)
        watch = Stopwatch(device)
        found = trainer.updater.accumulate(chosen, kind.rows)
        seconds = watch.lap()
    grads = [p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None]
    norm = float(torch.cat(grads).norm())
    return Learned(seconds, peak(device), float(found.sums["loss"]), norm)


def turns(setup: Setup) -> dict[str, Any]:
    """Every kind once a turn, on the same transitions; the first turn is not counted."""
    trainer = trainer_of(setup, paths(4))
    warm_up(trainer)
    watch = Stopwatch(trainer.policy.device)
    drawn = trainer.collector.collect(0)
    draw = watch.lap()
    (chosen,) = trainer.collector.batches(drawn, 0, 0, trainer.objective)
    runs: dict[str, list[Learned]] = {kind.name: [] for kind in KINDS}
    for _ in range(2 if setup.small else 1 + TURNS):
        for kind in KINDS:
            runs[kind.name].append(learn(trainer, chosen, kind))
    seconds = {name: [found.seconds for found in rows[1:]] for name, rows in runs.items()}
    return {
        "draw": draw,
        "paths": len(drawn.condition),
        "transitions": len(chosen.row),
        "runs": {name: [vars(found) for found in rows] for name, rows in runs.items()},
        "learning, published / ours": ratios(seconds, 0.0),
        "update, published / ours": ratios(seconds, draw),
    }


def ratios(seconds: Mapping[str, Sequence[float]], draw: float) -> dict[str, list[float]]:
    """Of each turn: the published way's seconds over each other's, `draw` added to both."""
    base = seconds[KINDS[0].name]
    return {
        kind.name: [(a + draw) / (b + draw) for a, b in zip(base, seconds[kind.name], strict=True)]
        for kind in KINDS[1:]
    }


CASES: dict[str, Case] = {"turns": turns}
