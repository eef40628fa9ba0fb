"""Gradients of a linear fit of the reward, against closed forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nablagfn.config import Config, ConfigError, set_option
from nablagfn.core import kernels
from nablagfn.methods.objectives.reweighted import PoolSignals, ReweightedRegression
from nablagfn.methods.registry import check_settings
from nablagfn.training.draws import Draw
from nablagfn.training.linear import Course, Field, LinearReward, LogQuadratic, shared_variance
from nablagfn.training.trainer import Trainer
from tests.test_critic import Known, output, walked
from tests.test_pool import (
    PROMPTS,
    collector,
    goes_on_with_fewer_rows,
    options,
    trained,
    trainer,
    transitions,
)
from tests.worlds import PromptedWorld

LINEAR = {"experiment__method": "nabla-db-pool", "pool__gradient": "linear"}


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------------------------- the two fits


def test_a_linear_reward_is_found_again_and_noise_is_not_taken_for_one() -> None:
    x, slope = noise(400, 3, 2), torch.tensor([[1.0, -2.0], [0.5, 0.0], [0.0, 3.0]])
    reward = (x * slope).flatten(1).sum(1) + 7
    found = LinearReward.fit(x, reward)
    torch.testing.assert_close(found.slope, slope, atol=1e-4, rtol=1e-4)
    assert found.explained > 0.9999
    assert LinearReward.fit(x, noise(400, seed=1)).explained < 0.02
    assert LinearReward.fit(x, torch.full((400,), 2.0)).explained == 0


def test_the_penalty_is_the_one_of_the_least_error_left_out() -> None:
    """Fewer samples than dimensions: PRESS in closed form against leaving each out for real."""
    x, slope = noise(20, 30), noise(30, seed=1)
    reward = x @ slope + 3 * noise(20, seed=2)
    found = LinearReward.fit(x, reward)

    def error(penalty: float) -> float:
        wrong = []
        for i in range(20):
            rest = torch.arange(20) != i
            mean, level = x[rest].mean(0), reward[rest].mean()
            gram = (x[rest] - mean).T @ (x[rest] - mean) + penalty * torch.eye(30).double()
            fitted = torch.linalg.solve(gram, (x[rest] - mean).T @ (reward[rest] - level))
            wrong.append(reward[i] - level - (x[i] - mean) @ fitted)
        return float(torch.stack(wrong).square().mean())

    scale = float(torch.linalg.svdvals(x - x.mean(0)).square().mean())
    errors = {power: error(scale * 10**power) for power in (-6.0, -1.0, 0.0, 1.0, 3.0)}
    told = (1 - found.explained) * float((reward - reward.mean()).square().mean())
    # centring anew without each sample is a little other than the leverage 1/n of the mean
    assert told == pytest.approx(min(errors.values()), rel=0.15)
    assert told < 0.9 * errors[-6.0]


def test_the_expected_weight_and_its_slope_are_found_again() -> None:
    score = noise(5_000)
    exact = (-0.3 + 0.8 * score - 0.05 * score.square()).exp()
    found = LogQuadratic.fit(score, exact)
    torch.testing.assert_close(found.value, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.slope, 0.8 - 0.1 * score, rtol=1e-5, atol=1e-5)
    noisy = LogQuadratic.fit(score, exact * 2 * torch.rand(5_000).double())
    assert float((noisy.slope - 0.8 + 0.1 * score).abs().mean()) < 0.1


def test_the_share_that_is_told_is_within_a_prompt() -> None:
    slot = torch.arange(2_000) % 2
    a, b = noise(2_000), noise(2_000, seed=1)
    mixed = 0.6 * a + 0.8 * b + 50 * slot
    assert shared_variance(a, mixed, slot) == pytest.approx(0.36, abs=0.05)
    assert shared_variance(a, b + 50 * slot, slot) < 0.01
    assert shared_variance(a, a, slot) == 0.9  # not all: something is left to the steps
    assert shared_variance(a, torch.ones(2_000), slot) == 0


# ------------------------------------------------------------------------- the target's own step


def test_for_a_linear_reward_and_normal_samples_the_aim_is_the_targets_step() -> None:
    """The gradient, its slope and its weight, all measured: d* of `worlds/gaussian`."""
    known = Known.of()
    x, u, _ = walked(known, torch.zeros(4, dtype=torch.float64))
    table, steps = known.table, known.table.num_steps
    reward = x[:, -1] @ known.slope[-1]
    fitted = LinearReward.fit(x[:, -1], reward)
    slope = fitted.slope.double()
    scores, gradients = [], []
    points = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double()
    for step in range(steps):
        k = table.at_step(step, points)
        clean = kernels.predict_clean(points, output(known.policy, table, points, step), k.here)
        jacobian = clean[1:] - clean[0]  # the posterior mean of a normal is affine
        gradients.append((jacobian @ slope).expand(len(x), -1))
        scores.append((x[:, step] @ jacobian + clean[0]) @ slope)
    field = Field(
        torch.stack([*scores, x[:, -1] @ slope], 1),
        torch.stack([*gradients[1:], slope.expand(len(x), -1)], 1),
    )
    slot = torch.zeros(len(x), dtype=torch.long)
    draw = Draw(x, u, u, slot, reward, x[:, :, 0][:, :0], torch.zeros(len(x), steps), x[:, :0])
    beta = 1.0
    weight = (beta * reward - (beta * reward).logsumexp(0)).exp() * len(x)
    log_z = torch.zeros(len(x), dtype=torch.float64)
    course = Course.of(draw, field)
    judged = course.judged(weight, log_z, beta, steps)
    assert course.told < 0.05  # this sampler begins with noise
    for step in (0, 3, 5, 8, steps - 1):
        factor = (judged.end / judged.now)[:, step].double()
        if 0 < step < steps - 1:
            assert float(factor.std() / factor.mean()) < 0.1  # no path's own, nearly
        aim = factor[:, None] * known.std[step] * field.gradient[:, step]
        exact = known.std[step] * known.slope[step + 1]
        away = (weight[:, None] * (aim - exact)).mean(0)
        assert float(away.norm()) < 0.12 * float(exact.norm()), step
    assert float(judged.now[:, 0].mean()) == pytest.approx(1, abs=0.02)
    # a prompt whose rewards, and with them its log Z, are higher by a constant
    shift = torch.where(torch.arange(len(x)) % 2 == 0, 3.0, 0.0).double()
    shifted = replace(course, score=course.score + shift[:, None])
    again = shifted.judged(weight, log_z + beta * shift, beta, steps)
    torch.testing.assert_close(again.end, judged.end, rtol=1e-4, atol=1e-4)


def test_the_aim_is_the_targets_step_where_the_step_is_long() -> None:
    """One step from noise to ±1, the reward its sign: the gradient where the step begins is not
    what the target does, that where it ends is (Stein's identity)."""
    noise_of_step = noise(200_000)
    centre = 0.3
    x_next = centre + noise_of_step  # σ = 1, then ĥ(x) = exp(1.2 tanh x), known
    score = x_next
    exact_weight = (1.2 * score - 0.2 * score.square()).exp()
    weight = exact_weight / exact_weight.mean()
    course = Course(torch.stack([score * 0, score], 1), told=0.0)
    judged = course.judged(weight, torch.zeros_like(score), 1.0, 1)
    aim = float(judged.end.double().mean()) / float(judged.now.double().mean())
    exact = float((weight * noise_of_step).mean())
    assert aim == pytest.approx(exact, abs=0.02)
    assert abs(1.2 - 0.4 * centre - exact) > 0.2  # the gradient of log ĥ where the step begins


def test_what_the_first_state_tells_is_made_up_for() -> None:
    known = Known.of()
    x, u, _ = walked(known, torch.zeros(4, dtype=torch.float64))
    few = slice(0, 400)
    slot = torch.zeros(400, dtype=torch.long)
    field = Field(x[few, :4, 0], noise(400, 3, 4))
    reward = x[few, 0, 0] + noise(400, seed=4)  # half of it is known at once
    draw = Draw(
        x[few], u[few], u[few], slot, reward, x[few, :, 0][:, :0], torch.zeros(400, 12), x[few, :0]
    )
    course = Course.of(draw, field)
    assert course.told == pytest.approx(0.5, abs=0.1)
    weight = (reward - reward.logsumexp(0)).exp() * 400
    log_z = torch.zeros(400, dtype=torch.float64)
    made_up = course.judged(weight, log_z, 1.0, 12)
    plain = replace(course, told=0.0).judged(weight, log_z, 1.0, 12)
    assert plain.end[:, :3].abs().sum() > 0 and not made_up.end[:, 3:].any()
    torch.testing.assert_close(made_up.end, plain.end / (1 - course.told))


# ------------------------------------------------------------------------------------- the pool


def test_the_pool_keeps_scores_and_gradients_of_predicted_samples(tmp_path: Path) -> None:
    """J_x̂ᵀ a by finite differences, at the path's own state and prompt."""
    made = collector(options(tmp_path), tmp_path, gradients="linear")
    drawn = made.collect(0)
    base, policy, table = made._base, made.policy, made.table
    assert base is not None and drawn.pooled is not None and made._course is not None
    fitted = LinearReward.fit(base.x[:, -1], base.reward)
    condition = policy.condition([made.slots[i] for i in base.slot.tolist()], [{}] * len(base.x))

    def score(x: Tensor, step: int) -> Tensor:
        clean = x  # the last step ends at the sample itself
        if step < table.num_steps:
            k = table.at_step(step, x)
            with torch.no_grad(), policy.reference():
                clean = kernels.predict_clean(x, policy.output(x, k.here.time, condition), k.here)
        return (clean * fitted.slope).flatten(1).sum(1)

    for step in (0, 3, 5):
        x, size = base.x[:, step + 1], 1e-2
        moved = torch.zeros_like(x)
        moved.flatten(1)[:, 0] = size
        slope = (score(x + moved, step + 1) - score(x - moved, step + 1)) / (2 * size)
        found = base.gradient[:, step].flatten(1)[:, 0]
        torch.testing.assert_close(found, slope, rtol=2e-2, atol=2e-3)
        torch.testing.assert_close(made._course.score[:, step + 1].float(), score(x, step + 1))
    torch.testing.assert_close(base.gradient[:, -1], fitted.slope.expand_as(base.x[:, -1]))


def test_the_field_goes_on_with_fewer_rows_where_memory_runs_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goes_on_with_fewer_rows(
        tmp_path, capsys, "linear", "_field_of", lambda draw, slope: len(draw.slot)
    )


def test_the_fit_follows_beta(tmp_path: Path) -> None:
    """The guard lowers β by `temper`; the fit is made again then, and only then."""
    made = collector(options(), tmp_path, gradients="linear")
    first = made.collect(0)
    at_first = made._fitted
    made.collect(1)
    assert made._fitted is at_first
    made.log_reward = replace(made.log_reward, temper=lambda: 0.5)
    lowered = made.collect(0)
    other = collector(options(model__reward_scale=1.0), tmp_path / "b", gradients="linear")
    known = other.collect(0)
    assert first.pooled and lowered.pooled and known.pooled and lowered.pooled.judged
    assert known.pooled.judged is not None
    torch.testing.assert_close(lowered.pooled.judged.end, known.pooled.judged.end)
    torch.testing.assert_close(lowered.pooled.judged.now, known.pooled.judged.now)


def test_what_is_learned_is_the_judged_length_along_the_gradient(tmp_path: Path) -> None:
    made = trainer(options(tmp_path, pool__gradient_cap=0.0, **LINEAR))
    chosen, batch = transitions(made, made.collector.collect(0))
    pooled, objective, signals = chosen.paths.pooled, made.objective, batch.signals
    assert isinstance(objective, ReweightedRegression) and isinstance(signals, PoolSignals)
    assert pooled is not None and pooled.judged is not None and pooled.gradient is not None
    k = objective.table.at(batch.step, batch.x)
    aim = objective.aimed(batch, signals, k)
    beta, row, step = 2.0, chosen.row, chosen.step
    wanted = pooled.judged.end[row, step].reshape(k.std.shape) * beta * k.std
    assert aim.any()
    torch.testing.assert_close(aim, wanted * pooled.gradient[row, step])
    torch.testing.assert_close(signals.weight, pooled.judged.now[row, step])
    assert not objective.uses_reward_gradient and objective.carries_gradient


def test_it_goes_on_bit_for_bit_and_makes_damaged_files_again(tmp_path: Path) -> None:
    whole = trained(options(tmp_path / "whole", **LINEAR))
    trained(options(tmp_path / "parts", training__num_epochs=3, **LINEAR))
    files = sorted((tmp_path / "parts").rglob("pool/rank00_linear_*"))
    assert files
    files[0].write_bytes(b"x")
    again = trained(options(tmp_path / "parts", **LINEAR))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_black_box_will_do(tmp_path: Path) -> None:
    """No gradient of the reward is asked for."""

    def box(images: Tensor, prompts: object, metadata: object) -> Tensor:
        return images.detach().flatten(1).sum(1)

    box.differentiable = False  # type: ignore[attr-defined]
    config = options(tmp_path, training__num_epochs=2, **LINEAR)
    made = Trainer(PromptedWorld(hidden=8), box, PROMPTS, config, show_progress=False)
    assert made.fit().finished


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pool.looks": 2}, "config.pool.looks=2 does not go with config.pool.gradient=linear"),
        ({"pool.own_share": 0.5}, "set it to 0"),
        ({"pool.gradient_share": 0.5}, "set it to 1"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(changes: dict[str, object], words: str) -> None:
    config: Config = options(**LINEAR)
    for key, value in changes.items():
        set_option(config, key, value)
    with pytest.raises(ConfigError) as raised:
        check_settings(config)
    assert words in str(raised.value) and "\n" not in str(raised.value)
