"""One optimizer step on chosen transitions, whatever their objective and however they are split."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config import Config
from ..core.types import Objective, Policy, Selection
from ..runs.progress import console
from ..runtime import backoff, distributed
from ..runtime.optimizers import build_optimizer
from .diagnostics import StepDiagnostics


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line that says why and what to do.

    alone: the other processes know nothing of it.
    """

    def __init__(self, message: str, *, alone: bool = False) -> None:
        super().__init__(message)
        self.alone = alone


def require_finite(value: float, what: str, advice: str) -> None:
    """Raises TrainingError, before the weights are touched, for what is not finite."""
    if not math.isfinite(value):
        raise TrainingError(f"{what} is not finite: {advice}; earlier checkpoints are kept")


@dataclass(frozen=True)
class Updated:
    """What is logged of one update: averages, and the same by noise level."""

    metrics: dict[str, float]
    by_step: dict[str, Any]


@dataclass(frozen=True)
class Accumulated:
    """What this process added up: sums of loss terms and metrics over the transitions."""

    sums: dict[str, Tensor]
    by_step: StepDiagnostics


class Updater:
    """Owns the optimizer of θ and of the objective's own parameters.

    rows: transitions per forward pass; fewer once memory has run out.
    """

    def __init__(
        self, accelerator: Accelerator, policy: Policy, objective: Objective, config: Config
    ) -> None:
        self.accelerator = accelerator
        self.objective = objective
        self.together = policy.together
        self.num_steps = config.sampling.num_steps
        self.limit = config.training.max_grad_norm
        self.rows = config.training.micro_batch or config.training.batch_size
        self.groups = [
            policy.parameters(),
            [p for p in objective.modules.parameters() if p.requires_grad],
        ]
        fused = config.speed.fused_optimizer
        self.optimizer = build_optimizer(config.training, *self.groups, fused=fused)
        self.scaler = distributed.gradient_scaler(config, accelerator.device)

    def update(self, chosen: Selection) -> Updated:
        """One optimizer step on the transitions of this process.

        The loss is the mean over all transitions, whatever the micro-batch. Raises TrainingError
        when the gradient is not finite, and torch.OutOfMemoryError when one row is too many, or at
        once where the other processes wait within a pass.
        """
        if self.together:
            found = self.accumulate(chosen, self.rows)
        else:
            fitted = backoff.fit(lambda rows: self.accumulate(chosen, rows), self.rows, self._say)
            self.rows, found = fitted.rows, fitted.value
        metrics = distributed.average_metrics(self.accelerator, found.sums)
        return Updated({**metrics, **self._step()}, found.by_step.row(self.accelerator))

    def _say(self, text: str) -> None:
        """Print it from every process: each has its own memory."""
        console.print(f"process {self.accelerator.process_index}: {text}")

    def accumulate(self, chosen: Selection, rows: int) -> Accumulated:
        """The update's gradients, `rows` transitions at a time."""
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.limit_rows(rows)
        batch = chosen.transitions(self.objective.prepare(chosen))
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=batch.x.device))
        by_step = StepDiagnostics(self.num_steps, batch.x.device)
        learned = [p for group in self.groups for p in group]
        for part in torch.arange(len(batch)).split(rows):
            losses = self.objective.losses(batch[part])
            loss = losses.total().sum() / len(batch)
            self.scaler.scale(loss).backward(inputs=learned)  # and not on to x_k
            values = {f"loss_{name}": value.detach() for name, value in losses.terms.items()}
            values |= losses.metrics
            by_step.add(batch.step[part], values, losses.vectors)
            sums["loss"] += loss.detach()
            for name, value in values.items():
                sums[name] += value.sum() / len(batch)
        return Accumulated(sums, by_step)

    def _step(self) -> dict[str, float]:
        """Average gradients over processes, clip each group, step once."""
        parameters = [p for group in self.groups for p in group]
        distributed.average_gradients(self.accelerator, parameters)
        self.scaler.unscale_(self.optimizer)
        norms = [nn.utils.clip_grad_norm_(group, self.limit) for group in self.groups if group]
        if not self.scaler.is_enabled():  # the scaler skips such a step and lowers its scale
            advice = "lower config.model.reward_scale or config.training.lr"
            require_finite(float(sum(norms)), "the gradient", advice)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {
            name: float(norm)
            for name, norm in zip(("grad_norm", "grad_norm_own"), norms, strict=False)
        }
