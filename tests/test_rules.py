"""Flow-SDE and CPS by their own formulas, and what they leave of the first noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nablagfn import worlds
from nablagfn.config import Config, ConfigError, set_option
from nablagfn.core import kernels
from nablagfn.core.kernels import KernelTable, kernel_table
from nablagfn.core.rules import Rule, cps, flow_sde, posterior
from nablagfn.core.samplers import SAMPLERS, amount_of, forgets
from nablagfn.core.schedules import DiscreteNoising, LinearNoising, Schedule, schedule_of
from nablagfn.families.stable_diffusion import STABLE_DIFFUSION
from nablagfn.methods.build import build_kernel
from nablagfn.methods.registry import check_settings, target_of
from nablagfn.recipes.options import load_config
from nablagfn.worlds.policy import WorldPolicy
from tests.worlds import sd_alphas_cumprod

FLOW_TIMES = [1.0, 0.8, 0.5, 0.2, 0.1]


def shifted(num_steps: int, shift: float, end: float = 1e-3) -> Schedule:
    """σ = st/(1 + (s − 1)t) of equal steps of t, as SD3 and FLUX have them."""
    times = [1 - k / num_steps for k in range(num_steps)]
    sigmas = [shift * t / (1 + (shift - 1) * t) for t in times]
    return schedule_of(LinearNoising(cleanest=end), sigmas)


def drawn(schedule: Schedule) -> list[Tensor]:
    """x and v at each step, [N, 4] each."""
    shape = (2, len(schedule.time) - 1, 4)
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(shape, generator=generator, dtype=torch.float64))


def mean_of(table: KernelTable, x: Tensor, v: Tensor) -> Tensor:
    return kernels.mean(x, v, table.at(torch.arange(table.num_steps), x))


@pytest.mark.parametrize("a", [0.3, 0.7, 2**0.5])
@pytest.mark.parametrize("end", [0.0, 0.03])
def test_flow_sde_is_its_published_step(a: float, end: float) -> None:
    """Written out for each step; at σ = 1 the denominator 1 − σ has the second step's σ."""
    schedule = schedule_of(LinearNoising(cleanest=end), FLOW_TIMES)
    table = kernel_table(schedule, a, "flow", flow_sde)
    x, v = drawn(schedule)
    found = mean_of(table, x, v)
    sigmas = [*FLOW_TIMES, end]
    for k in range(5):
        sigma, step = sigmas[k], sigmas[k] - sigmas[k + 1]
        s = a * math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
        mean = x[k] * (1 - s**2 * step / (2 * sigma))
        mean = mean - v[k] * step * (1 + s**2 * (1 - sigma) / (2 * sigma))
        torch.testing.assert_close(found[k], mean, rtol=1e-12, atol=1e-12)
        assert float(table.std[k]) == pytest.approx(s * math.sqrt(step), rel=1e-12)


@pytest.mark.parametrize("a", [0.3, 0.7, 1.0])
def test_cps_is_its_published_step(a: float) -> None:
    schedule = schedule_of(LinearNoising(cleanest=0.03), FLOW_TIMES)
    table = kernel_table(schedule, a, "flow", cps)
    x, v = drawn(schedule)
    found = mean_of(table, x, v)
    sigmas = [*FLOW_TIMES, 0.03]
    for k in range(5):
        sigma, after = sigmas[k], sigmas[k + 1]
        std = after * math.sin(a * math.pi / 2)
        clean, noise = x[k] - sigma * v[k], x[k] + (1 - sigma) * v[k]
        mean = (1 - after) * clean + noise * math.sqrt(after**2 - std**2)
        torch.testing.assert_close(found[k], mean, rtol=1e-12, atol=1e-12)
        assert float(table.std[k]) == pytest.approx(std, rel=1e-12)


def test_twenty_steps_of_shift_three() -> None:
    """The deviations of the first step, of .5 → .429 and of .25 → .136."""
    schedule = shifted(20, 3.0)
    rows = [0, 15, 18]
    sigmas = torch.stack([schedule.sigma[rows], schedule.sigma[[k + 1 for k in rows]]], 1)
    known = torch.tensor([[1.0, 0.983], [0.5, 0.429], [0.25, 0.136]], dtype=torch.float64)
    torch.testing.assert_close(sigmas, known, rtol=0, atol=5e-4)
    for rule, a, stds in (
        (posterior, 1.0, [0.983, 0.283, 0.120]),
        (flow_sde, 0.7, [0.700, 0.187, 0.136]),
    ):
        found = rule(schedule, a).std[rows]
        expected = torch.tensor(stds, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=6e-4)


def test_the_posterior_tends_to_the_memoryless_noise() -> None:
    """√(2Δσ/(1 − σ)), to first order in Δ; Flow-SDE at 0.7 has a quarter of its variance, and at √2
    all of it."""
    errors = []
    for step in (1e-3, 1e-4, 1e-5):
        for sigma in (0.2, 0.5, 0.9):
            schedule = schedule_of(LinearNoising(cleanest=sigma - step), [sigma])
            memoryless = 2 * step * sigma / (1 - sigma)
            variance = float(posterior(schedule, 1.0).std.square())
            errors.append(abs(variance / memoryless - 1))
            for a, share in ((0.7, 0.245), (2**0.5, 1.0)):
                theirs = float(flow_sde(schedule, a).std.square())
                assert theirs / memoryless == pytest.approx(share, rel=1e-9)
    assert max(errors[3:6]) < 0.11 * max(errors[:3]) < 0.01
    assert max(errors[6:]) < 0.11 * max(errors[3:6])


def kept(rule: Rule, a: float, schedule: Schedule) -> float:
    """Correlation of x_0 and x_N for data N(0, 1), exact: x̂ = αx/(α² + σ²) there."""
    steps = rule(schedule, a)
    alpha, sigma = schedule.alpha[:-1], schedule.sigma[:-1]
    slope = steps.on_x + steps.on_clean * alpha / (alpha.square() + sigma.square())
    variance = torch.ones((), dtype=torch.float64)
    for factor, std in zip(slope, steps.std, strict=True):
        variance = factor.square() * variance + std.square()
    return float(slope.prod() / variance.sqrt())


def test_what_is_left_of_the_first_noise() -> None:
    """The posterior forgets it in its first step from σ = 1. Of Flow-SDE at 0.7 a fifth is left
    after 20 steps, and that falls slowly: (1 − σ₁)^(a²/2) by 2^−0.245 when the steps are halved."""
    few, many, more = shifted(20, 3.0), shifted(320, 3.0), shifted(640, 3.0)
    assert kept(posterior, 1.0, few) == 0
    assert kept(flow_sde, 0.7, few) == pytest.approx(0.198, abs=1e-3)
    ratio = kept(flow_sde, 0.7, more) / kept(flow_sde, 0.7, many)
    assert ratio == pytest.approx(2**-0.245, rel=0.02)
    assert abs(kept(flow_sde, 2**0.5, many)) < 0.01 and kept(cps, 0.7, few) < 1e-4


def test_what_cannot_be_is_refused() -> None:
    curved = schedule_of(DiscreteNoising(sd_alphas_cumprod()), [900, 500, 1])
    flow = schedule_of(LinearNoising(cleanest=0.03), FLOW_TIMES)
    to_clean = schedule_of(LinearNoising(), FLOW_TIMES)
    for rule in (flow_sde, cps):
        with pytest.raises(ValueError, match="flow models"):
            rule(curved, 0.7)
        with pytest.raises(ValueError, match="a must be"):
            rule(flow, 0.0)
    with pytest.raises(ValueError, match="a must be"):
        cps(flow, 1.1)
    with pytest.raises(ValueError, match="no density"):
        cps(to_clean, 0.7)


# -------------------------------------------------------------------------------- of a run


def config_of(world: str, **options: object) -> Config:
    config = load_config(f"worlds/{world}")
    for key, value in options.items():
        set_option(config, key.replace("__", "."), value)
    return config


def test_a_run_gets_the_rule_that_it_asks_for() -> None:
    policy = WorldPolicy(worlds.load("ring-flow"))
    for name, rule in (("flow-sde", flow_sde), ("cps", cps)):
        config = config_of("ring-flow", sampling__scheduler=name, sampling__sde_noise=0.4)
        table = build_kernel(config, policy)
        assert torch.equal(table.std, rule(table.schedule, 0.4).std)
        assert amount_of(config.sampling) == 0.4 and not forgets(config.sampling)
        assert "does not lead to p_pretrained" in target_of(config).why
        assert SAMPLERS[name].misses in target_of(config).why
    memoryless = config_of("ring-flow", sampling__scheduler="flow-sde", sampling__sde_noise=1.4142)
    assert target_of(memoryless).beta == 2.0
    plain = config_of("ring-flow")
    assert forgets(plain.sampling) and target_of(plain).beta == 2.0


@pytest.mark.parametrize(
    ("world", "options", "message"),
    [
        ("ring", {"sampling__scheduler": "flow-sde"}, "scheduler=flow-sde is for flow models"),
        ("ring", {"sampling__scheduler": "cps"}, "scheduler=cps is for flow models"),
        (
            "ring-flow",
            {"sampling__scheduler": "cps", "sampling__sde_noise": 1.2},
            "sde_noise=1.2: at 1 all noise",
        ),
        ("ring-flow", {"sampling__sde_noise": 0.5}, "sde_noise=0.5 has a meaning for flow-sde"),
        (
            "ring-flow",
            {"sampling__scheduler": "flow-sde", "sampling__eta": 0.5},
            "eta=0.5 has no meaning for flow-sde",
        ),
        (
            "ring-flow",
            {"sampling__scheduler": "flow-sde", "experiment__method": "reward-weighted"},
            "does not go with a pool",
        ),
    ],
)
def test_one_line_says_what_does_not_go(
    world: str, options: dict[str, object], message: str
) -> None:
    config = config_of(world, **options)
    with pytest.raises(ConfigError, match=message) as raised:
        check_settings(config)
        build_kernel(config, WorldPolicy(worlds.load(world)))
    assert "\n" not in str(raised.value)


def test_diffusers_has_no_such_scheduler() -> None:
    with pytest.raises(ConfigError, match="nablagfn sample"):
        STABLE_DIFFUSION.stock_sampler(config_of("ring-flow", sampling__scheduler="flow-sde"))
