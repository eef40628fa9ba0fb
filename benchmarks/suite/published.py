"""One update done as the published code does it, in turns with ours: the ratio.

The published work per transition is three passes of the U-Net forward, five back and two decodes
with gradient (docs/performance.md). Here each gradient of residual ∇-DB is taken by a backward pass
of its own, four transitions at a time; the numbers are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from one_update import memory as peak
from torch import Tensor

from nablagfn.core import kernels
from nablagfn.core.lookahead import row_attenuation
from nablagfn.core.types import Selection
from nablagfn.core.value_gradient import Evaluated
from nablagfn.methods.estimators.residual_db import ResidualDB, reverse_cotangent
from nablagfn.training.trainer import Trainer

from .child import Case, Setup
from .subject import Stopwatch, paths, reset, trainer_of, warm_up

TURNS = 3


class Unmerged(ResidualDB):
    """Residual ∇-DB whose two gradients at x_k come by two backward passes through ε_θ(x_k)."""

    def reverse_target(self, here: Evaluated) -> Tensor:
        """∇_{x_k}[log p_θ − s·log p_#](x_{k+1}|x_k) + β·γ·∇r(x̂_θ(x_k)), detached, [M, ...]."""
        batch, k = here.batch, here.k
        m = kernels.mean(here.x, here.output, k)
        cotangent = reverse_cotangent(batch.x_next, m, k)
        (score,) = torch.autograd.grad(m, here.x, cotangent, retain_graph=True)
        x_clean = kernels.predict_clean(here.x, here.output, k.here)
        value = self.log_reward(x_clean, batch.condition)
        gamma = row_attenuation(k.here.alpha_bar, self.mode, value)
        (slope,) = torch.autograd.grad(value, here.x, gamma, retain_graph=True)
        return score + slope - self.strength * here.ahead.score_ref


@contextmanager
def learning_as(kind: Kind, trainer: Trainer) -> Iterator[None]:
    """Inside it the trainer's objective makes the passes of that kind."""
    objective: Any = trainer.objective
    own: ResidualDB = objective.estimator
    objective.estimator = (ResidualDB if kind.merged else Unmerged)(
        own.policy,
        replace(own.log_reward, piece=kind.slice),
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
    """A way to learn from the same transitions, `rows` at a time, `slice` pictures decoded at a
    time (0: all).
    """

    name: str
    rows: int
    merged: bool
    slice: int = 0


KINDS = (
    Kind("published", 4, merged=False),
    Kind("ours", 4, merged=True),
    Kind("ours, micro_batch=16, vae_slice=4", 16, merged=True, slice=4),
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
    with learning_as(kind, trainer):
        reset(device)
        watch = Stopwatch(device)
        found = trainer.updater.accumulate(chosen, kind.rows)
        seconds = watch.lap()
    grads = [p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None]
    norm = float(torch.cat(grads).norm())
    return Learned(seconds, peak(device), float(found.sums["loss"]), norm)


def turns(setup: Setup) -> dict[str, Any]:
    """Every kind once a turn, on the same transitions, while there is time; the first turn is not
    counted."""
    trainer = trainer_of(setup, paths(4))
    warm_up(trainer)
    watch = Stopwatch(trainer.policy.device)
    drawn = trainer.collector.collect(0)
    draw = watch.lap()
    (chosen,) = trainer.collector.batches(drawn, 0, 0, trainer.objective)
    runs: dict[str, list[Learned]] = {kind.name: [] for kind in KINDS}
    about = {"draw": draw, "paths": len(drawn.condition), "transitions": len(chosen.row)}
    for turn in range(2 if setup.small else 1 + TURNS):
        last = sum(found[-1].seconds for found in runs.values() if found)
        if turn > 1 and setup.left < 1.5 * last:
            break
        for kind in KINDS:
            runs[kind.name].append(learn(trainer, chosen, kind))
        setup.note({**about, **compared(runs, draw)})
    return {**about, **compared(runs, draw)}


def compared(runs: Mapping[str, Sequence[Learned]], draw: float) -> dict[str, Any]:
    """All turns, and the ratios of those after the first."""
    seconds = {name: [found.seconds for found in rows[1:]] for name, rows in runs.items()}
    return {
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
