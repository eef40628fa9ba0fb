"""worlds/learned-grid: a learned score, its packaged weights, and the target of its own sampler.

What holds in every world is in tests/test_worlds.py, which runs over this one, too.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nablagfn import worlds
from nablagfn.core.kernels import KernelTable
from nablagfn.core.rollout import rollout
from nablagfn.core.schedules import Levels
from nablagfn.worlds import measures
from nablagfn.worlds.learned import WEIGHTS, Dense, LearnedScore, uneven_grid
from nablagfn.worlds.policy import WorldPolicy
from nablagfn.worlds.target import Target
from nablagfn.worlds.world import World, vector
from tests import tables

STEPS = 32
COUNT = 20_000
RAREST = 6  # of the nine modes, with 0.05
FILE = WEIGHTS / "learned_grid.safetensors"
SHA256 = "22c9ee224ca868b86fdd5cb6daecab61cd4ea8471e903ba53effbd2ff0471581"
X = ((0.3, -0.2), (1.0, 1.4), (-2.0, 0.5))
X_CLEAN = (  # x̂ there at α = 0.8, σ = 0.6, as the trained network gave it
    (0.3847514686605426, -0.1813667466193942),
    (0.9621169639539057, 1.422034937673783),
    (-1.6209809262896997, 0.29790232907890213),
)
WORLD = worlds.load("learned-grid")


def learned() -> LearnedScore:
    assert isinstance(WORLD.mixture, LearnedScore)
    return WORLD.mixture


def table() -> KernelTable:
    return tables.table_of(WorldPolicy(WORLD), STEPS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at(angle: float, rows: int, size: float = 1.0) -> Levels:
    """The levels of a noise angle, [rows, 1] float64 each; α² + σ² is size²."""
    one = torch.full((rows, 1), size, dtype=torch.float64)
    return Levels(math.cos(angle) * one, math.sin(angle) * one)


@lru_cache
def drawn(seed: int, world: World = WORLD) -> Tensor:
    """Draws of the frozen sampler with a seed of the test's own, [COUNT, 2] float64."""
    policy = WorldPolicy(world)
    noise = torch.randn(COUNT, STEPS + 1, 2, generator=generator(seed))
    condition = policy.condition(world.prompts * COUNT)
    with policy.reference():
        return rollout(policy, table(), noise, condition).clean.double()


# ---------------------------------------------------------------------------- the score


@pytest.mark.parametrize("angle", [0.029, 0.8, math.pi / 2 - 0.02])
@pytest.mark.parametrize("size", [1.0, 0.6])
def test_clean_sample_and_noise_make_up_x(angle: float, size: float) -> None:
    levels = at(angle, 50, size)
    x = 2 * torch.randn(50, 2, generator=generator(), dtype=torch.float64)
    found = learned().posterior(x, levels)
    back = levels.alpha * found.x_clean + levels.sigma * found.eps
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    v = (levels.alpha * found.eps - levels.sigma * found.x_clean) / size
    torch.testing.assert_close(v, learned().velocity(x, levels), rtol=1e-12, atol=1e-12)
    rescaled = learned().posterior(x / size, at(angle, 50))  # the same signal-to-noise ratio
    torch.testing.assert_close(found.x_clean, rescaled.x_clean, rtol=1e-9, atol=1e-9)


def test_the_network_by_hand() -> None:
    """One hidden layer of two, one point, one number after the other."""
    first = torch.linspace(-0.5, 0.6, 20, dtype=torch.float64).reshape(2, 10)
    second = vector(1.0, 0.5, -1.0, 2.0).reshape(2, 2)
    layers = (Dense(first, vector(0.1, -0.2)), Dense(second, vector(0.3, 0.0)))
    score = LearnedScore(uneven_grid(), layers)
    score.check()
    angle, x = 0.7, (0.4, -1.1)
    octaves = [angle * 2**j for j in range(4)]
    seen = [*x, *map(math.sin, octaves), *map(math.cos, octaves)]
    sums = [sum(w * s for w, s in zip(row, seen, strict=True)) for row in first.tolist()]
    one, two = (h / (1 + math.exp(-h)) for h in (sums[0] + 0.1, sums[1] - 0.2))
    v = (one + 0.5 * two + 0.3, 2 * two - one)
    found = score.posterior(torch.tensor([x], dtype=torch.float64), at(angle, 1))
    for i in range(2):
        x_clean = math.cos(angle) * x[i] - math.sin(angle) * v[i]
        eps = math.sin(angle) * x[i] + math.cos(angle) * v[i]
        assert float(found.x_clean[0, i]) == pytest.approx(x_clean, abs=1e-12)
        assert float(found.eps[0, i]) == pytest.approx(eps, abs=1e-12)


def test_float32_is_as_good_as_float32_can_be() -> None:
    for angle in (0.029, 0.8, math.pi / 2 - 0.02):
        levels = at(angle, 500)
        x = torch.randn(500, 2, generator=generator(1), dtype=torch.float64)
        narrow = Levels(levels.alpha.float(), levels.sigma.float())
        small = learned().to("cpu", torch.float32).posterior(x.float(), narrow)
        wide = learned().posterior(x, levels)
        for one, other in ((small.eps, wide.eps), (small.x_clean, wide.x_clean)):
            assert one.dtype == torch.float32 and other.dtype == torch.float64
            torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-4)


def test_the_score_is_near_that_of_its_mixture_and_not_it() -> None:
    """ε against the exact one, root mean square over noised draws: 0.108, 0.074 and 0.024 of √2."""
    for angle in (0.1, 0.4, 0.8):
        levels, exact = at(angle, COUNT), uneven_grid()
        x = exact.noised(math.cos(angle), math.sin(angle)).sample(COUNT, generator(2))
        off = learned().posterior(x, levels).eps - exact.posterior(x, levels).eps
        error = float(off.square().sum(1).mean().sqrt())
        assert 0.01 < error < 0.15


# ---------------------------------------------------------------------------- its file


def test_the_packaged_weights_are_the_trained_ones(tmp_path: Path) -> None:
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == SHA256
    assert FILE.stat().st_size < 200_000
    x, levels = torch.tensor(X, dtype=torch.float64), at(math.atan2(0.6, 0.8), 3)
    found = learned().posterior(x, levels)
    golden = torch.tensor(X_CLEAN, dtype=torch.float64)
    torch.testing.assert_close(found.x_clean, golden, rtol=0, atol=1e-6)
    learned().save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == FILE.read_bytes()


def test_damaged_networks_are_refused() -> None:
    good = learned()
    first, *rest = good.layers
    with pytest.raises(ValueError, match=r"layer 0 must have the shape \(64, 10\), not \(64, 9\)"):
        replace(good, layers=(replace(first, weight=first.weight[:, 1:]), *rest)).check()
    with pytest.raises(ValueError, match="layer 0 has a number that is not finite"):
        replace(good, layers=(replace(first, bias=first.bias / 0), *rest)).check()
    for layers in ((), good.layers[:-1]):
        with pytest.raises(ValueError, match="the last layer must have 2 outputs"):
            replace(good, layers=layers).check()
    with pytest.raises(FileNotFoundError):
        LearnedScore.read(WEIGHTS / "nowhere.safetensors", uneven_grid())


# ---------------------------------------------------------------------------- its target


def test_the_target_is_that_of_the_learned_sampler() -> None:
    """Another seed's weighted draws agree within a standard error of the difference (0.43)."""
    target = Target.of(WORLD, table(), WORLD.prompts[0], count=COUNT)
    x, first = drawn(3), torch.zeros(COUNT, dtype=torch.long)
    rewards = WORLD.reward(x, first)
    weights = (WORLD.beta * rewards).softmax(0)
    own = float(weights @ rewards)
    error = math.sqrt(
        float((weights.square() * (rewards - own).square()).sum())
        + float((target.weights.square() * (target.rewards - target.reward).square()).sum())
    )
    assert target.reward == pytest.approx(own, abs=error)
    assert WORLD.closed_form is None and target.gaussian is None


def test_the_sampler_errs_beside_its_steps() -> None:
    """An exact score on the same noise draws the rarest mode narrower, by 0.72; the standard error
    of the ratio is 0.06 at a thousand draws each. Both end in about the masses of the mixture."""
    exact = drawn(3, replace(WORLD, mixture=uneven_grid()))
    variances, masses = [], []
    for x in (drawn(3), exact):
        modes = WORLD.mixture.mode_of(x)
        variances.append(float(x[modes == RAREST, 0].var()))
        masses.append(measures.mode_masses(modes, 9))
    assert 0.5 < variances[1] / variances[0] < 0.85
    assert all(float((m - learned().weights).abs().max()) < 0.02 for m in masses)


def test_an_adapter_at_zero_draws_what_the_frozen_sampler_draws() -> None:
    policy = WorldPolicy(WORLD, seed=5)
    noise = torch.randn(COUNT, STEPS + 1, 2, generator=generator(3))[:500]
    found = rollout(policy, table(), noise, policy.condition(WORLD.prompts * 500)).clean
    with policy.reference():
        frozen = rollout(policy, table(), noise, policy.condition(WORLD.prompts * 500)).clean
    assert torch.equal(found, frozen)


def test_the_reward_reaches_x_through_the_network() -> None:
    """The guess of a value gradient needs the network's derivative with respect to x."""
    x = torch.randn(4, 2, generator=generator(4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: learned().posterior(x, at(0.5, 4)).x_clean, x)
    assert not any(t.requires_grad for layer in learned().layers for t in vars(layer).values())
