"""One epoch's data: which prompts, noise and transitions, as functions of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..config import Config
from ..core import rng
from ..core.kernels import KernelTable
from ..core.rollout import rollout
from ..core.types import Condition, Objective, Policy, Selection, Trajectories
from ..prompts import PromptSet

Between = Callable[[int, int], object]  # (batches that are done, of how many), before each


def ignored(done: int, total: int) -> None:
    """Nobody wants to know."""


class Collector:
    """Draws this process's share of each epoch.

    Trajectories have a global index within the epoch, and their prompt, noise and transitions
    depend on it alone: an epoch's trajectories are the same whatever the number of processes. With
    several updates per epoch, which of them share an update does depend on that number.
    """

    def __init__(
        self,
        policy: Policy,
        table: KernelTable,
        prompts: PromptSet,
        config: Config,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.policy = policy
        self.table = table
        self.prompts = prompts
        self.config = config
        self.rank = rank
        self.world = world

    def indices(self, batch: int) -> range:
        """Global indices of this process's trajectories in sampling batch `batch`."""
        size = self.config.sampling.batch_size
        start = (batch * self.world + self.rank) * size
        return range(start, start + size)

    def collect(self, epoch: int, between: Between = ignored) -> Trajectories:
        """All trajectories of this process for one epoch, from the policy as it is now.

        between: called before each sampling batch.
        """
        drawn = []
        count = self.config.sampling.num_batches_per_epoch
        for batch in range(count):
            between(batch, count)
            drawn.append(self._draw(epoch, self.indices(batch)))
        return _concatenate(drawn)

    def _draw(self, epoch: int, indices: range) -> Trajectories:
        seed = self.config.seed
        prompts = [
            self.prompts.draw(rng.generator(seed, "prompt", epoch, index)) for index in indices
        ]
        noise = rng.normal(
            (self.table.num_steps + 1, *self.policy.sample_shape),
            indices,
            seed=seed,
            purpose="noise",
            step=epoch,
        )
        return rollout(
            self.policy,
            self.table,
            noise,
            self.policy.condition(prompts, self.prompts.metadata(prompts)),
        )

    def batches(
        self, drawn: Trajectories, epoch: int, inner: int, objective: Objective
    ) -> Iterator[Selection]:
        """The data of each optimizer update of one inner epoch, in shuffled order."""
        step = epoch * self.config.training.num_inner_epochs + inner
        count = len(drawn.condition)
        order = torch.randperm(
            count, generator=rng.generator(self.config.seed, "shuffle", step, self.rank)
        )
        size = self.config.training.batch_size * self.config.training.gradient_accumulation_steps
        for rows in order.split(size):
            yield self._choose(drawn, rows, step, objective)

    def _choose(
        self, drawn: Trajectories, rows: torch.Tensor, step: int, objective: Objective
    ) -> Selection:
        """The trajectories `rows`, with the steps that the objective chooses of each."""
        per_batch = self.config.sampling.batch_size
        chosen, owners, seeds = [], [], []
        for position, row in enumerate(rows.tolist()):
            index = self.indices(row // per_batch)[row % per_batch]
            generator = rng.generator(self.config.seed, "steps", step, index)
            steps = objective.choose(self.table.num_steps, generator)
            chosen.append(steps)
            owners.append(torch.full_like(steps, position))
            seeds.append(torch.randint(2**62, steps.shape, generator=generator))
        return Selection(drawn[rows], torch.cat(owners), torch.cat(chosen), torch.cat(seeds))


def _concatenate(parts: list[Trajectories]) -> Trajectories:
    return Trajectories(
        torch.cat([part.x for part in parts]),
        torch.cat([part.output for part in parts]),
        Condition.cat([part.condition for part in parts]),
    )
