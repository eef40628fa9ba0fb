"""The only sampling loop, and the choice of transitions to learn from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels, start
from .kernels import KernelTable
from .types import Condition, Policy, Trajectories, beside


def rollout(
    policy: Policy, table: KernelTable, noise: Tensor, condition: Condition
) -> Trajectories:
    """Draw one trajectory per row of `noise` from the policy as it is now.

    noise: [B, N+1, ...] standard normal; noise[:, 0] is x_0, up to its mean (`core.start`) and
    standard deviation (1 unless the schedule loses variance); noise[:, k+1] drives transition k.
    """
    noise = noise.to(policy.device)
    with torch.no_grad():
        x = start.drawn(noise[:, 0], table.start_std, start.mean_of(policy))
        return walk(policy, table, x, noise[:, 1:], condition)


def walk(
    policy: Policy,
    table: KernelTable,
    x: Tensor,
    noise: Tensor,
    condition: Condition,
    *,
    first: int = 0,
) -> Trajectories:
    """Transitions `first`, first+1, … from x [B, ...], one per entry of noise [B, K, ...].

    Differentiable in the policy's parameters and in x unless under torch.no_grad().
    """
    path, predictions = [x], []
    for step in range(noise.shape[1]):
        k = table.at_step(first + step, x)
        output = policy.output(x, k.here.time, condition)
        x = kernels.mean(x, output, k) + k.std * noise[:, step]
        path.append(x)
        predictions.append(output)
    return Trajectories(torch.stack(path, 1), torch.stack(predictions, 1), condition)


def noise_of(paths: Trajectories, table: KernelTable, first: int) -> Tensor:
    """z_k = (x_{k+1} − m(x_k))/σ_k that drove steps first..N-1 of the paths, [B, N-first, ...]."""
    drawn = []
    for step in range(first, paths.num_steps):
        x = paths.x[:, step]
        k = table.at_step(step, x)
        drawn.append(kernels.step_noise(x, paths.x[:, step + 1], paths.output[:, step], k))
    return torch.stack(drawn, 1)


def fingerprints(x: Tensor) -> list[str]:
    """A digest of each sample's numbers, [B, ...] -> B strings: equal for equal samples."""
    return [hashlib.blake2b(row.numpy(), digest_size=8).hexdigest() for row in x.float().cpu()]


def replay(
    policy: Policy, table: KernelTable, x: Tensor, step: Tensor, noise: Tensor, condition: Condition
) -> Tensor:
    """x_N [M, ...] of paths taken up again: row i goes on from x[i] = x_k with k = step[i].

    noise: [M, K, ...] of the last K transitions, K >= N - k for every row. Differentiable like
    `walk`. Rows join when the walk passes their step: no row depends on the others.
    """
    first = table.num_steps - noise.shape[1]
    active = torch.zeros(0, dtype=torch.long)
    now, where = x[:0], condition
    for k in range(int(step.min()), table.num_steps):
        joined = (step.cpu() == k).nonzero()[:, 0]
        if len(joined):
            active = torch.cat([active, joined])
            now = torch.cat([now, x[beside(joined, x)]])
            where = condition[active]
        driven = noise[beside(active, noise), k - first : k - first + 1]
        now = walk(policy, table, now, driven, where, first=k).clean
    return now[beside(active.argsort(), now)]


@dataclass(frozen=True)
class StepChoice:
    """Which steps of each trajectory are learned from (`subsample_steps`), as settings."""

    fraction: float = 1.0
    low_variance: bool = True

    def __call__(self, num_steps: int, generator: torch.Generator) -> Tensor:
        return subsample_steps(num_steps, self.fraction, self.low_variance, generator)


@dataclass(frozen=True)
class WindowChoice:
    """A window of `length` consecutive steps, anywhere on the trajectory (all of a shorter one).

    Windows that would stick out are moved inside, so the ends are drawn somewhat more often.
    """

    length: int

    def __call__(self, num_steps: int, generator: torch.Generator) -> Tensor:
        length = min(self.length, num_steps)
        (start,) = torch.randint(1 - length, num_steps, (1,), generator=generator).tolist()
        return min(max(start, 0), num_steps - length) + torch.arange(length)


@dataclass(frozen=True)
class SpreadChoice:
    """One step of each of ⌊fraction·N⌋ equal stretches (at least 1), and no other."""

    fraction: float

    def __call__(self, num_steps: int, generator: torch.Generator) -> Tensor:
        if self.fraction >= 1:
            return torch.arange(num_steps)
        return subsample_steps(num_steps, self.fraction, True, generator)[:-1]


def subsample_steps(
    num_steps: int, fraction: float, low_variance: bool, generator: torch.Generator
) -> Tensor:
    """Which steps of one trajectory to learn from: [n+1] integers, the last step always among them.

    n = ⌊fraction·N⌋ (at least 1) steps: without replacement, or with `low_variance` one from each
    of n equal strata. fraction >= 1 gives all N steps once.
    """
    if fraction >= 1:
        return torch.arange(num_steps)
    n = max(1, int(num_steps * fraction + 1e-9))
    if low_variance:
        edges = torch.linspace(0, num_steps, n + 1, dtype=torch.float64)
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        steps = (edges[:-1] + u * edges.diff()).long()
    else:
        steps = torch.randperm(num_steps, generator=generator)[:n]
    return torch.cat([steps, torch.tensor([num_steps - 1])])
