"""The tilted target from weighted samples, against closed forms (`metrics.tilting`).

For r ~ N(m, 1) under p: E*[r] = m + β, KL* = β²/2, log Z = βm + β²/2, and for many samples
ESS = exp(−β²).
"""

from __future__ import annotations

import math

import pytest
import torch

from nablagfn.core import rng
from nablagfn.metrics import tilting
from nablagfn.metrics.intervals import basic, basic_of_log, percentile, resampled_counts
from nablagfn.metrics.tilting import PromptRows

MEANS = (-3.0, 0.0, 5.0)  # of three prompts: mixed up, they would look like a spread of rewards


def drawn(count: int, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Rewards of three prompts, N(mean, 1) each, and the prompts."""
    noise = torch.randn(len(MEANS) * count, generator=rng.generator(seed, "rewards"))
    prompts = [str(mean) for mean in MEANS for _ in range(count)]
    return torch.tensor(MEANS, dtype=torch.float64).repeat_interleave(count) + noise, prompts


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_target_of_normal_rewards(beta: float) -> None:
    reward, prompts = drawn(20_000)
    groups = PromptRows.of(prompts)
    mean = sum(MEANS) / len(MEANS)
    near = {"abs": 0.03}
    assert float(tilting.target_reward(reward, beta, groups)) == pytest.approx(mean + beta, **near)
    assert float(tilting.target_kl(reward, beta, groups)) == pytest.approx(beta**2 / 2, **near)
    log_w = tilting.tilt(reward, beta)
    log_z = beta * mean + beta**2 / 2
    assert float(tilting.log_mean(log_w, groups)) == pytest.approx(log_z, **near)
    assert float(tilting.effective_share(log_w, groups)) == pytest.approx(
        math.exp(-(beta**2)), **near
    )


def test_the_order_of_rows_and_unequal_sizes_change_nothing() -> None:
    reward, prompts = drawn(50)
    keep = torch.cat([torch.arange(40), torch.arange(50, 150)])
    shuffled = keep[torch.randperm(140, generator=rng.generator(0, "order"))]
    found = [
        float(
            tilting.target_kl(reward[rows], 1.0, PromptRows.of([prompts[i] for i in rows.tolist()]))
        )
        for rows in (keep, shuffled)
    ]
    own = [
        float(tilting.target_kl(reward[rows], 1.0, PromptRows.of(["one"] * len(rows))))
        for rows in (torch.arange(40), torch.arange(50, 100), torch.arange(100, 150))
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-12)
    assert found[0] == pytest.approx(sum(own) / 3, abs=1e-12)
    assert PromptRows.of([prompts[i] for i in keep.tolist()]).fewest == 40


def test_counts_are_repetitions() -> None:
    reward, prompts = drawn(6)
    counts = torch.randint(1, 4, (2, 18), generator=rng.generator(0, "counts"))
    for figure in (tilting.log_mean, tilting.effective_share):
        found = figure(reward, PromptRows.of(prompts), counts)
        for row, own in enumerate(counts):
            again = PromptRows.of(
                [p for p, n in zip(prompts, own.tolist(), strict=True) for _ in range(n)]
            )
            repeated = figure(reward.repeat_interleave(own), again)
            assert float(found[row]) == pytest.approx(float(repeated), abs=1e-12)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_beta_is_found_again(beta: float) -> None:
    reward, prompts = drawn(200)
    groups = PromptRows.of(prompts)
    kl, mean = tilting.target_kl(reward, beta, groups), tilting.target_reward(reward, beta, groups)
    assert tilting.beta_of_kl(reward, float(kl), groups) == pytest.approx(beta, rel=1e-6)
    assert tilting.beta_of_reward(reward, float(mean), groups) == pytest.approx(beta, rel=1e-6)
    assert float(tilting.least_kl(reward, mean, groups)) == pytest.approx(float(kl), rel=1e-5)


def test_what_few_samples_cannot_show_is_refused() -> None:
    reward, prompts = drawn(16)
    groups = PromptRows.of(prompts)
    assert tilting.most_kl(groups) == pytest.approx(math.log(16) - 1)
    with pytest.raises(ValueError, match=r"16 samples .* above 1\.8 nats"):
        tilting.beta_of_kl(reward, 1.8, groups)
    for wanted in (float(reward.max()) + 1, 0.7 + 2.0):  # beyond all, and beyond log M − 1
        with pytest.raises(ValueError, match="do not reach so far"):
            tilting.beta_of_reward(reward, wanted, groups)
    assert bool(tilting.least_kl(reward, float(reward.max()) + 1, groups).isnan())
    assert float(tilting.least_kl(reward, -9.0, groups)) == pytest.approx(0, abs=1e-9)


def test_the_bias_of_few_samples_is_judged_from_half_of_them() -> None:
    """Truth 0.5 nats at β = 1; 16 samples give too little, and half of them tell how much."""
    found, judged = [], []
    for seed in range(200):
        reward, prompts = drawn(16, seed)
        groups = PromptRows.of(prompts)
        found.append(float(tilting.target_kl(reward, 1.0, groups)))
        judged.append(
            tilting.halved(lambda r, part: tilting.target_kl(r, 1.0, part), reward, groups)
        )
    bias = sum(found) / len(found) - 0.5
    assert bias < -0.03
    assert sum(judged) / len(judged) == pytest.approx(bias, rel=0.35)
    assert math.isnan(
        tilting.halved(lambda r, part: tilting.log_mean(r, part), reward[:3], PromptRows.of("abc"))
    )


@pytest.mark.parametrize("samples, least", [(16, 0.6), (64, 0.68)])
def test_intervals_hold_the_truth(samples: int, least: float) -> None:
    """80 % intervals at β = ½ in 150 experiments of 12 prompts. Plain percentile intervals, which
    take the bias of few samples for the truth, hold KL* in 20 and 50 %."""
    prompts = [str(i) for i in range(12) for _ in range(samples)]
    groups = PromptRows.of(prompts)
    held = {"kl": 0, "reward": 0, "percentile": 0}
    for seed in range(150):
        reward = torch.randn(len(prompts), generator=rng.generator(seed, "rewards")).double()
        counts = resampled_counts(prompts, 200, rng.generator(seed, "bootstrap"))
        kl, kls = (tilting.target_kl(reward, 0.5, groups, c) for c in (None, counts))
        mean, means = (tilting.target_reward(reward, 0.5, groups, c) for c in (None, counts))
        for name, truth, found in (
            ("kl", 0.125, basic_of_log(float(kl), kls, 0.8)),
            ("reward", 0.5, basic(float(mean), means, 0.8)),
            ("percentile", 0.125, percentile(float(kl), kls, 0.8)),
        ):
            assert found.low is not None and found.high is not None
            held[name] += found.low <= truth <= found.high
    assert least <= held["kl"] / 150 <= 0.9 and least <= held["reward"] / 150 <= 0.9, held
    assert held["percentile"] < held["kl"] - 20


def test_systematic_resampling() -> None:
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    taken = torch.zeros(4)
    for k in range(100):
        rows = tilting.systematic(weights, 10, (k + 0.5) / 100)
        counts = torch.bincount(rows, minlength=4)
        assert bool(((counts >= (10 * weights).floor()) & (counts <= (10 * weights).ceil())).all())
        taken += counts
    torch.testing.assert_close(taken.double() / 1000, weights, atol=2e-3, rtol=0)


def test_a_kl_that_shared_best_rewards_do_not_reach_is_refused() -> None:
    """Two of four samples share the largest reward: the target is never further than log 2."""
    groups = tilting.PromptRows.of(["a"] * 40)
    reward = torch.tensor([0.0, 1.0] * 20)
    assert float(tilting.target_kl(reward, 1e9, groups)) == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match=r"no β is further than 0\.69 nats"):
        tilting.beta_of_kl(reward, 1.0, groups)


def test_kl_of_a_reward_far_from_zero_keeps_its_digits() -> None:
    """r and r + c have one target; at β = 33,333.3 float32 would lose a tenth of the KL."""
    reward = torch.randn(64, generator=rng.generator(0, "t"), dtype=torch.float64) / 33333.3
    groups = tilting.PromptRows.of(["a"] * 64)
    near, far = (float(tilting.target_kl(r, 33333.3, groups)) for r in (reward, reward + 25))
    assert far == pytest.approx(near, rel=1e-6)
    assert float(tilting.target_kl(torch.full((64,), 25.0), 1e15, groups)) == 0


def test_an_interval_near_zero_is_not_reflected() -> None:
    """Of a figure that some resamples put at 0, the logarithm has no bound."""
    values = torch.linspace(0, 2, 201, dtype=torch.float64)
    found = basic_of_log(1.0, values, 0.9)
    assert found.low == pytest.approx(0.1) and found.high == pytest.approx(1.9)
    tight = basic_of_log(1.0, torch.linspace(0.5, 2, 201, dtype=torch.float64), 0.9)
    assert tight.low is not None and tight.high is not None
    assert 0.5 < tight.low < 0.6 and 1.7 < tight.high < 1.8
