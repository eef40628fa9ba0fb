"""The KL of path measures: against closed forms and against the log-ratio of drawn paths."""

from __future__ import annotations

import torch
from torch.distributions import Normal, kl_divergence

from nablagfn.core import kernels, rng
from nablagfn.core.path_kl import path_kl, step_kl
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


def test_the_pretrained_sampler_is_at_distance_zero(exact_world: MixtureWorld) -> None:
    table, paths = drawn(exact_world, 8)
    assert path_kl(exact_world, table, paths).abs().max() == 0
