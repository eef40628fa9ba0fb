"""The target of a world as the sampler can reach it: p_#·exp(βr), p_# the pretrained sampler.

p_# ends at ᾱ_0 < 1 and has a discretisation error of its own, so the tilted mixture in closed form
is not quite what finetuning converges to. Weighted samples of the sampler itself are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..core import rng
from ..core.kernels import KernelTable
from ..core.rollout import rollout
from ..core.schedules import Levels
from .measures import mode_masses
from .mixture import Mixture, tilted
from .policy import WorldPolicy
from .world import World

COUNT = 200_000  # base samples
CHUNK = 5_000  # of them drawn at a time
SEED = 0  # of the base samples: the target is no part of a run's randomness

_base: dict[tuple[object, ...], Tensor] = {}
_known: dict[tuple[object, ...], Target] = {}


def base_samples(
    world: World, table: KernelTable, count: int = COUNT, device: torch.device | str = "cpu"
) -> Tensor:
    """Draws of the pretrained sampler, [count, d] float32, kept in memory per world and table.

    They depend on the world and the table's coefficients alone. 200,000 draws of 64 steps take
    seconds.
    """
    key = (world.mixture, _coefficients(table), count)
    if key not in _base:
        policy = WorldPolicy(world, device=device)
        with policy.reference():
            _base[key] = torch.cat(
                [
                    _chunk(policy, table, min(CHUNK, count - start), start)
                    for start in range(0, count, CHUNK)
                ]
            )
    return _base[key]


def _coefficients(table: KernelTable) -> tuple[float, ...]:
    """What the sampler's density depends on."""
    return tuple(torch.cat([table.on_x, table.on_clean, table.std, table.schedule.alpha]).tolist())


def _chunk(policy: WorldPolicy, table: KernelTable, size: int, start: int) -> Tensor:
    shape = (size, table.num_steps + 1, *policy.sample_shape)
    noise = torch.randn(shape, generator=rng.generator(SEED, "world", 0, start))
    condition = policy.condition([policy.world.prompts[0]] * size)  # the base model ignores it
    return rollout(policy, table, noise, condition).clean.cpu()


def gaussian_chain(mixture: Mixture, table: KernelTable) -> Mixture:
    """The exact distribution of x_N for K = 1: ε is affine, so every x_k is Gaussian.

    With x̂(x) = (α·v·x + σ²·μ)/(α²·v + σ²), one step is mean' = on_x·mean + on_clean·x̂(mean),
    variance' = (on_x + on_clean·α·v/(α²·v + σ²))²·variance + std², from N(0, α_0² + σ_0²).
    Raises ValueError for K > 1.
    """
    if len(mixture) != 1:
        raise ValueError("the chain is exact for one Gaussian only")
    mean = torch.zeros(1, mixture.dim, dtype=torch.float64)
    variance = torch.full((mixture.dim,), table.start_std**2, dtype=torch.float64)
    for step in range(table.num_steps):
        alpha, sigma = table.schedule.alpha[step], table.schedule.sigma[step]
        x_clean = mixture.posterior(mean, Levels(alpha, sigma)).x_clean
        slope = alpha * mixture.variances / (alpha.square() * mixture.variances + sigma.square())
        on_x, on_clean = table.on_x[step], table.on_clean[step]
        mean = on_x * mean + on_clean * x_clean
        variance = (on_x + on_clean * slope).square() * variance + table.std[step].square()
    return Mixture(mean, mixture.weights, variance)


@dataclass(frozen=True, eq=False)
class Target:
    """p_#·exp(β·r(·, prompt)) as weighted samples.

    base: [S, d] draws of p_#. weights: [S] float64, self-normalised, ∝ exp(βr).
    gaussian: exact mean [d] and covariance [d, d] for K = 1 and a quadratic reward, else None.
    """

    world: World
    prompt: str
    base: Tensor
    weights: Tensor
    rewards: Tensor
    gaussian: tuple[Tensor, Tensor] | None

    @staticmethod
    def of(
        world: World,
        table: KernelTable,
        prompt: str,
        *,
        count: int = COUNT,
        device: torch.device | str = "cpu",
    ) -> Target:
        """The target of the sampler `table`, kept in memory: its floors and yardsticks are then
        computed once in a process. Raises ConfigError for an unknown prompt.
        """
        key = (world, _coefficients(table), prompt, count)
        if key not in _known:
            _known[key] = Target._make(world, table, prompt, count, device)
        return _known[key]

    @staticmethod
    def _make(
        world: World, table: KernelTable, prompt: str, count: int, device: torch.device | str
    ) -> Target:
        row = int(world.rows([prompt])[0])
        base = base_samples(world, table, count, device)
        rewards = world.reward(base.double(), torch.full((len(base),), row))
        gaussian, closed = None, world.closed_form
        if closed is not None and len(closed.mixture) == 1:
            chain = gaussian_chain(closed.mixture, table)
            gaussian = tilted(chain, closed.reward, row, world.beta).moments()
        weights = (world.beta * rewards).softmax(0)
        return Target(world, prompt, base, weights, rewards, gaussian)

    @property
    def effective_size(self) -> float:
        """1/Σw², in 1..S: as many equally weighted samples carry the same information."""
        return float(1 / self.weights.square().sum())

    def expected(self, values: Tensor) -> Tensor:
        """E of values [S] or [S, ...] given on `base`, a weighted average."""
        return torch.tensordot(self.weights, values.double(), 1)

    @cached_property
    def reward(self) -> float:
        """E[r] under the target."""
        return float(self.expected(self.rewards))

    @cached_property
    def masses(self) -> Tensor:
        """Mass of each mode, [K] float64: the share of samples that `mode_of` counts to it."""
        mixture = self.world.mixture
        return mode_masses(mixture.mode_of(self.base), len(mixture), self.weights)

    @cached_property
    def _cumulative(self) -> Tensor:
        return self.weights.cumsum(0)

    def resample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws of the target, [count, d]: base samples with replacement by weight.

        A few of them coincide when `count` is not small beside `effective_size`.
        """
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        place = torch.searchsorted(self._cumulative, u * self._cumulative[-1])
        return self.base[place.clamp(max=len(self.base) - 1)]
