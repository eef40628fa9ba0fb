"""The KL of path measures: against closed forms and against the log-ratio of drawn paths."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from nablagfn.core import kernels, rng
from nablagfn.core.path_kl import log_weight, path_kl, path_ratio, step_kl
from nablagfn.core.rollout import rollout
from tests.tables import discrete_table, table_of
from tests.worlds import MixtureWorld

LEVELS = torch.linspace(0.99, 0.02, 100, dtype=torch.float64)


def test_step_kl_is_the_kl_of_two_gaussians() -> None:
    table = discrete_table(LEVELS, [90, 60, 30])
    x, eps, output_ref = torch.randn(3, 5, 2, 4, generator=rng.generator(0, "t")).double()
    k = table.at(torch.tensor([0, 1, 2, 2, 1]), x)
    p, q = (Normal(kernels.mean(x, e, k), k.std.expand_as(x)) for e in (eps, output_ref))
    expected = kl_divergence(p, q).flatten(1).sum(1)
    torch.testing.assert_close(step_kl(eps, output_ref, k), expected, rtol=1e-12, atol=0)


def drawn(world: MixtureWorld, count: int):
    table = table_of(world, 20)
    noise = rng.normal((21, *world.sample_shape), range(count), seed=0, purpose="t").double()
    return table, rollout(world, table, noise, world.condition(["a"] * count, ()))


def test_path_kl_is_the_mean_log_ratio_of_the_policy_own_paths(world: MixtureWorld) -> None:
    """KL = E_θ log p_θ/p_#: two estimates from the same paths, whose gap has mean zero."""
    table, paths = drawn(world, 4000)
    nats = path_kl(world, table, paths)
    ratio = torch.zeros(len(nats), dtype=torch.float64)
    for step in range(paths.num_steps):
        x = paths.x[:, step]
        k = table.at_step(step, x)
        with torch.no_grad(), world.reference():
            output_ref = world.output(x, k.here.time, paths.condition)
        own = kernels.log_prob(x, paths.x[:, step + 1], paths.output[:, step], k)
        ratio += own - kernels.log_prob(x, paths.x[:, step + 1], output_ref, k)
    gap = ratio - nats.sum(1)
    error = gap.std() / len(gap) ** 0.5
    assert nats.sum(1).mean() > 10 * error
    assert gap.mean().abs() < 4 * error
    both = path_ratio(world, table, paths)
    torch.testing.assert_close(both.kl, nats)
    torch.testing.assert_close(both.log_ratio.sum(1), ratio, rtol=1e-9, atol=1e-9)


def test_weights_are_densities_of_the_target_over_those_of_the_draws() -> None:
    """q = (1 − a)·p_θ + a·p_#, written out with probabilities."""
    ratio = torch.tensor([-2.0, 0.0, 1.5], dtype=torch.float64)  # log p_θ/p_#
    reward = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64)
    for a in (0.0, 0.25, 0.9):
        drawn = (1 - a) * ratio.exp() + a
        expected = (3 * reward).exp() / drawn
        torch.testing.assert_close(log_weight(ratio, reward, 3.0, a).exp(), expected)
    lost = torch.tensor([-800.0], dtype=torch.float64)  # a path that the policy never takes
    assert float(log_weight(lost, reward[:1], 3.0)) == pytest.approx(800.9)
    assert float(log_weight(lost, reward[:1], 3.0, 0.25)) == pytest.approx(0.9 + math.log(4))


def test_the_ratio_of_the_pretrained_model_own_paths(world: MixtureWorld) -> None:
    """E_# p_θ/p_# = 1, and a mixture's E_q p_#/q is: both need the right sign and both models."""
    table = table_of(world, 20)
    noise = rng.normal((21, *world.sample_shape), range(4000), seed=1, purpose="t").double()
    condition = world.condition(["a"] * 4000, ())
    with world.reference():
        base = rollout(world, table, noise, condition)
    from_base = path_ratio(world, table, base, of_reference=True).log_ratio.sum(1)
    _, paths = drawn(world, 4000)
    own = path_ratio(world, table, paths).log_ratio.sum(1)
    assert own.mean() > 0 > from_base.mean()  # the KL of p_θ from p_#, and back
    both = torch.cat([own, from_base])
    weight = log_weight(both, torch.zeros(8000), 1.0, 0.5).exp()
    assert abs(float(weight.mean()) - 1) < 4 * float(weight.std()) / 8000**0.5
    assert float(weight.std()) > 0.1 and float(weight.max()) <= 2


def test_the_pretrained_sampler_is_at_distance_zero(exact_world: MixtureWorld) -> None:
    table, paths = drawn(exact_world, 8)
    assert path_kl(exact_world, table, paths).abs().max() == 0
