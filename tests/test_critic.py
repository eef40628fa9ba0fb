"""What the reward of predicted samples tells of a path's weight, against closed forms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nablagfn.config import set_option
from nablagfn.core import kernels
from nablagfn.core.kernels import KernelTable
from nablagfn.core.types import Transitions
from nablagfn.methods.objectives.reweighted import PoolSignals, ReweightedRegression
from nablagfn.training import critic
from nablagfn.training.critic import ExpectedWeight, Spans
from nablagfn.training.pool import PoolCollector
from nablagfn.worlds.policy import WorldPolicy
from tests.test_pool import collector, options, trained, trainer, transitions, world_table
from tests.worlds import PromptedWorld, tilt

DIMENSIONS, PATHS = 4, 30_000
SLOPE = torch.tensor([0.9, -0.6, 0.3, 0.0], dtype=torch.float64)  # of log w in x_N


def test_looks_are_where_there_is_signal_and_noise() -> None:
    share = torch.tensor([0.001, 0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 0.99, 1.0])
    assert critic.looks_at(share, 3) == (2, 4, 6)
    assert critic.looks_at(share, 1) == (4,)
    assert critic.looks_at(share, 99) == (2, 3, 4, 5, 6)
    assert critic.looks_at(share, 0) == () == critic.looks_at(share[:2], 4)


def test_a_step_is_judged_by_a_later_look() -> None:
    """Looks at the levels 2 and 4 of 6 steps: none before, at 2, at 4, the end."""
    spans = Spans.of((2, 4), 6, 1)
    assert spans.now == (0, 0, 1, 1, 2, 2)
    assert spans.then == (1, 1, 2, 2, 3, 3) and spans.until == (2, 2, 4, 4, 6, 6)
    assert Spans.of((2, 4), 6, 2).until == (4, 4, 6, 6, 6, 6)
    assert Spans.of((2, 4), 6, 0).until == (6,) * 6
    assert all(until > step for step, until in enumerate(spans.until))


def test_a_curve_finds_the_expected_weight_again() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(20_000, generator=generator, dtype=torch.float64)
    noise = torch.rand(20_000, generator=generator, dtype=torch.float64) * 2
    curve = ExpectedWeight.fit(score, score.exp() * noise)
    x = torch.linspace(-1.5, 1.5, 13, dtype=torch.float64)
    torch.testing.assert_close(curve.at(x), x.exp(), rtol=0.15, atol=0.02)
    assert torch.equal(curve.at(torch.tensor([9.0, 99.0])), curve.y[-1:].expand(2))
    middle = (curve.x[3] + curve.x[4]) / 2
    torch.testing.assert_close(curve.at(middle[None])[0], (curve.y[3] + curve.y[4]) / 2)


def test_paths_of_one_score_count_alike() -> None:
    """Whatever their order: the first ones of a prompt do not stand for all."""
    score = torch.cat([torch.zeros(600), torch.ones(400)])
    weight = torch.cat([torch.full((100,), 9.0), torch.ones(900)])
    curve = ExpectedWeight.fit(score, weight)
    found = curve.at(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(found, torch.tensor([14 / 6, 1.0]).double())


def test_few_paths_have_their_mean() -> None:
    curve = ExpectedWeight.fit(torch.arange(9.0), torch.arange(9.0))
    assert torch.equal(curve.at(torch.tensor([-5.0, 50.0])), torch.full((2,), 4.0).double())


def test_directions_are_those_in_which_ends_differ() -> None:
    """Ends that differ along two axes of four only, whatever the number of paths."""
    _, table = world_table("worlds/gaussian", 6)
    generator = torch.Generator().manual_seed(0)
    for n in (200, 4):
        x = torch.zeros(n, 7, DIMENSIONS, dtype=torch.float64)
        x[:, -1, [1, 3]] = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        found = critic.directions(x, torch.zeros(n, 6, DIMENSIONS).double(), table, 2)
        assert found is not None and found.shape == (6, DIMENSIONS, 2)
        z = torch.randn(6, DIMENSIONS, generator=generator)
        kept = torch.stack([kernels.along(z[k : k + 1], found[k])[0] for k in range(6)])
        torch.testing.assert_close(kept[:, [1, 3]], z[:, [1, 3]])
        assert float(kept[:, [0, 2]].abs().max()) < 1e-6
    assert critic.directions(x, torch.zeros(4, 6, DIMENSIONS).double(), table, 0) is None
    assert critic.directions(x, torch.zeros(4, 6, DIMENSIONS).double(), table, 4) is None


# --------------------------------------------------------------- the target's step, in closed form


@dataclass(frozen=True)
class Known:
    """The sampler of worlds/gaussian is linear: x_{k+1} = A_k x_k + b_k + σ_k z, and for a weight
    exp(SLOPE·x_N) the expected one is exp(slope_k·x + const), d*_k = σ_k·slope_{k+1}."""

    policy: WorldPolicy
    table: KernelTable
    slope: Tensor  # [N+1, 4]
    std: Tensor  # [N]

    @staticmethod
    def of(num_steps: int = 12) -> Known:
        policy, table = world_table("worlds/gaussian", num_steps)
        slope, std = [SLOPE], []
        points = torch.cat([torch.zeros(1, DIMENSIONS), torch.eye(DIMENSIONS)]).double()
        for step in reversed(range(num_steps)):
            k = table.at_step(step, points)
            mean = kernels.mean(points, output(policy, table, points, step), k)
            slope.insert(0, (mean[1:] - mean[0]) @ slope[0])
            std.insert(0, k.std.flatten()[0])
        return Known(policy, table, torch.stack(slope), torch.stack(std))

    def expected(self, x: Tensor) -> Tensor:
        """h of each level over its mean, [n, N+1], from paths x [n, N+1, 4] of the sampler."""
        power = (x * self.slope).sum(-1)
        return (power - power.logsumexp(0)).exp() * len(x)


def output(policy: WorldPolicy, table: KernelTable, x: Tensor, step: int) -> Tensor:
    with policy.reference(), torch.no_grad():
        time = table.time[step].expand(len(x))
        where = policy.condition(policy.world.prompts * len(x))
        return policy.output(x, time, where)


def walked(known: Known, moved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Paths [n, N+1, 4] whose every step is moved by σ_k·moved, u_# there, and log p/p_#."""
    generator = torch.Generator().manual_seed(3)
    count = known.table.num_steps
    z = torch.randn(PATHS, count + 1, DIMENSIONS, generator=generator, dtype=torch.float64)
    x, outputs = [z[:, 0] * known.table.start_std], []
    for step in range(count):
        k = known.table.at_step(step, x[-1])
        outputs.append(output(known.policy, known.table, x[-1], step))
        x.append(kernels.mean(x[-1], outputs[-1], k) + k.std * (z[:, step + 1] + moved))
    ratio = (z[:, 1:] * moved).sum(-1) + 0.5 * moved.square().sum()
    return torch.stack(x, 1), torch.stack(outputs, 1), ratio


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("moved", [0.0, 0.25])
def test_steps_are_those_of_the_target(ahead: int, moved: float) -> None:
    """E[t] over the pretrained model's paths, and over those of a policy that has moved, is d*."""
    known = Known.of()
    away = moved * torch.tensor([1.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    x, u, ratio = walked(known, away)
    base, *_ = walked(known, torch.zeros(DIMENSIONS).double()) if moved else (x,)
    scale = (base * known.slope).sum(-1).logsumexp(0) - torch.tensor(float(PATHS)).log()
    h = ((x * known.slope).sum(-1) - scale).exp()
    looks = (3, 6, 9)
    spans = Spans.of(looks, known.table.num_steps, ahead)
    value = torch.cat([torch.ones(PATHS, 1).double(), h[:, [*looks, -1]]], 1)
    now, then = critic.judged(value, ratio, spans, bool(moved))
    objective = ReweightedRegression(known.policy, known.table, weight="std", fraction=1.0)
    for step in (3, 5, 6, 10):
        k = known.table.at_step(step, x[:, step])
        drawn = u[:, step] + k.std / k.c2 * away
        batch, signals = at_step(known, x, u, drawn, now.double(), then.double(), step)
        rows = known.table.at(batch.step, batch.x)
        t = objective.aimed(batch, signals, rows)
        exact = known.std[step] * known.slope[step + 1]
        weight = signals.weight.mean()
        error = (t - signals.weight[:, None] * exact).std(0) / weight / PATHS**0.5
        assert bool(((t.mean(0) / weight - exact).abs() < 4 * error).all()), step
        assert float(exact.norm()) > 8 * float(error.norm())


def at_step(
    known: Known, x: Tensor, u: Tensor, drawn: Tensor, now: Tensor, then: Tensor, step: int
) -> tuple[Transitions, PoolSignals]:
    k = known.table.at_step(step, x[:, step])
    signals = PoolSignals(
        x[:, -1],
        u[:, step],
        torch.ones(len(x), dtype=torch.bool),
        then[:, step],
        now[:, step],
        then[:, step],
        noise=(x[:, step + 1] - kernels.mean(x[:, step], u[:, step], k)) / k.std,
        away=kernels.moved_mean(drawn, u[:, step], k),
    )
    where = known.policy.condition(known.policy.world.prompts * len(x))
    steps = torch.full((len(x),), step)
    return Transitions(x[:, step], x[:, step + 1], drawn, steps, where, signals), signals


# -------------------------------------------------------------------------------- in a pool and run


def looking(config_policy: PromptedWorld, tmp_path: Path, **more: object) -> PoolCollector:
    config = options(
        experiment__method="reward-weighted",
        sampling__num_steps=12,
        pool__looks=3,
        pool__directions=1,
        **more,
    )
    return collector(config, tmp_path, config_policy)


def test_a_pool_keeps_the_reward_of_what_is_predicted(tmp_path: Path) -> None:
    policy = PromptedWorld(hidden=8)
    made = looking(policy, tmp_path)
    drawn = made.collect(0)
    base = made._base
    assert base is not None and len(made.looks) == 3 and made.fresh == 0
    asked = [made.slots[i] for i in base.slot.tolist()]
    for column, step in enumerate(made.looks):
        k = made.table.at_step(step, base.x[:, step])
        predicted = kernels.predict_clean(base.x[:, step], base.output_ref[:, step], k.here)
        torch.testing.assert_close(base.seen[:, column], tilt(predicted, asked, []).float())
    judged = drawn.pooled and drawn.pooled.judged
    assert judged is not None and judged.directions is not None
    assert judged.now.shape == judged.then.shape == (6, 12)
    assert judged.directions.shape == (12, 2, 1)


def test_expected_weights_are_those_of_the_prompt(tmp_path: Path) -> None:
    """Mean 1 over each prompt, and at each look over all, up to the straight lines."""
    more = {"pool__size": 3000, "pool__images_per_prompt": 1000, "model__reward_scale": 0.5}
    made = looking(PromptedWorld(hidden=8), tmp_path, **more)
    draws = made._filled(0, lambda done, total: None)
    judged = made._judged(draws)
    now, then = judged.now, judged.then
    slot = draws[0].slot
    for prompt in range(3):
        assert float(then[slot == prompt, -1].mean()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(now.mean(0), torch.ones(12), rtol=0, atol=0.12)
    right = (then[:, -1] - now[:, -1]).square().mean()
    assert float(right) < 0.5 * float((then[:, -1] - 1).square().mean()), "looks tell of the end"


def test_what_a_prompt_is_worth_altogether_changes_nothing(tmp_path: Path) -> None:
    """Rewards of each prompt may be shifted, and those of what is predicted with them."""
    made = looking(PromptedWorld(hidden=8), tmp_path, pool__size=600, pool__images_per_prompt=200)
    (base,) = made._filled(0, lambda done, total: None)
    known = made._judged([base])
    by = torch.tensor([0.0, 3.0, -2.0])[base.slot]
    moved = made._judged([replace(base, reward=base.reward + by, seen=base.seen + by[:, None])])
    torch.testing.assert_close(moved.now, known.now, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.then, known.then, rtol=1e-4, atol=1e-5)


def test_a_run_with_looks_goes_on_bit_for_bit(tmp_path: Path) -> None:
    more = {"pool__looks": 2, "pool__own_share": 0.5, "pool__refresh": 1}
    whole = trained(options(tmp_path / "whole", **more))
    trained(options(tmp_path / "parts", training__num_epochs=3, **more))
    again = trained(options(tmp_path / "parts", **more))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    other = trained(options(tmp_path / "other", **{**more, "pool__looks": 0}))
    assert any(not torch.equal(whole[name], other[name]) for name in whole)


def test_own_paths_are_weighed_alike_where_they_are(tmp_path: Path) -> None:
    config = options(
        tmp_path,
        pool__own_share=1.0,
        pool__refresh=1,
        pool__looks=2,
        pool__directions=1,
        pool__size=240,
        pool__images_per_prompt=80,
        model__timestep_fraction=1.0,
    )
    set_option(config, "sampling.batch_size", 24)
    set_option(config, "training.batch_size", 24)
    made = trainer(config)
    with torch.no_grad():
        for parameter in made.policy.parameters():
            parameter.add_(0.1)
    assert isinstance(made.collector, PoolCollector)
    drawn = made.collector.collect(1)
    own = drawn.pooled and drawn.pooled.own
    assert own is not None and drawn.pooled is not None and drawn.pooled.judged is not None
    over = drawn.pooled.judged.now / drawn.pooled.control[:, None]
    torch.testing.assert_close(over[own], torch.ones_like(over[own]))
    then = drawn.pooled.judged.then / drawn.pooled.control[:, None]
    assert float(then[own].std()) > 0.01 and float(then.min()) >= 0
    _, batch = transitions(made, drawn, 1)
    k = made.table.at(batch.step, batch.x)
    assert isinstance(batch.signals, PoolSignals)
    assert (
        float(kernels.moved_mean(batch.output_old, batch.signals.output_ref, k).abs().max()) > 0.01
    )


def test_a_transition_has_what_is_known_of_its_step(tmp_path: Path) -> None:
    config = options(
        tmp_path,
        pool__looks=2,
        pool__ahead=1,
        pool__directions=1,
        pool__size=600,
        pool__images_per_prompt=200,
    )
    set_option(config, "model.timestep_fraction", 1.0)
    made = trainer(config)
    drawn = made.collector.collect(0)
    chosen, batch = transitions(made, drawn, 0)
    signals, known = batch.signals, chosen.paths.pooled and chosen.paths.pooled.judged
    assert isinstance(signals, PoolSignals) and known is not None and known.directions is not None
    row, step = chosen.row, chosen.step
    assert len({tuple(v.tolist()) for v in (known.now[0], known.then[0], known.end[0])}) == 3
    assert torch.equal(signals.weight, known.then[row, step])
    assert torch.equal(signals.control, known.now[row, step])
    assert torch.equal(signals.end, known.end[row, step])
    assert signals.noise is not None and signals.away is not None
    for i, number in enumerate(step.tolist()):
        k = made.table.at_step(number, batch.x[i : i + 1])
        mean = kernels.mean(batch.x[i : i + 1], signals.output_ref[i : i + 1], k)
        z = (batch.x_next[i : i + 1] - mean) / k.std
        kept = kernels.along(z, known.directions[number])
        torch.testing.assert_close(signals.noise[i : i + 1], kept)
    assert float(signals.away.abs().max()) < 1e-6
