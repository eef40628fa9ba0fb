"""Gradients of a linear fit of the reward, against closed forms."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nablagfn.config import Config, ConfigError, set_option
from nablagfn.core import kernels
from nablagfn.core.start import KEY
from nablagfn.methods.objectives.reweighted import PoolSignals, ReweightedRegression
from nablagfn.methods.registry import check_settings
from nablagfn.training.draws import Draw
from nablagfn.training.linear import (
    Course,
    Field,
    LinearReward,
    LogQuadratic,
    centred,
    shared_variance,
)
from nablagfn.training.pool import log_mean, mean_one
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


def test_few_paths_of_each_prompt_do_not_make_the_curve_flat() -> None:
    """Eight paths of a prompt know its log Z badly, so that over s − log Z the slope is found too
    small. What is left is that their weights have the mean 1, not its prompt's."""
    prompts, paths = 500, 8
    slot = torch.arange(prompts).repeat_interleave(paths)
    score, rest = 0.5 * noise(len(slot)), 0.8 * noise(len(slot), seed=1)
    reward = score + rest
    weight = mean_one(reward, slot)
    field = Field(score[:, None].repeat(1, 2), score[:, None], score[:, None])
    no = score[:, None]
    draw = Draw(no, no, no, slot, reward, no[:, :0], no, no[:, :0])
    judged = Course.of(draw, field).judged(weight, 1.0, 1)
    assert float((judged.end / judged.now).mean()) == pytest.approx(0.91, abs=0.06)
    log_z = log_mean(reward, slot, prompts)[slot]
    assert float(LogQuadratic.fit(score - log_z, weight).slope.mean()) < 0.7


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
        gradients[0],
    )
    slot = torch.zeros(len(x), dtype=torch.long)
    draw = Draw(x, u, u, slot, reward, x[:, :, 0][:, :0], torch.zeros(len(x), steps), x[:, :0])
    beta = 1.0
    weight = (beta * reward - (beta * reward).logsumexp(0)).exp() * len(x)
    course = Course.of(draw, field)
    judged = course.judged(weight, beta, steps)
    assert course.told == 0  # the first state is moved, too, to its mean in the target
    exact = known.slope[0]  # of log F̃ at x_0 ~ N(0, s²), so that it moves to s² times that
    for std in (1.0, 0.5):
        start = course.start(weight, beta, std).double()
        assert float((start - std**2 * exact).norm()) < 0.12 * std**2 * float(exact.norm())
    left = Course.of(draw, replace(field, first=field.first[:, :0]))
    assert 0 < left.told < 0.05  # this sampler begins with noise
    for step in (0, 3, 5, 8, steps - 1):
        factor = (judged.end / judged.now)[:, step].double()
        if 0 < step < steps - 1:
            assert float(factor.std() / factor.mean()) < 0.1  # no path's own, nearly
        aim = factor[:, None] * known.std[step] * field.gradient[:, step]
        exact = known.std[step] * known.slope[step + 1]
        away = (weight[:, None] * (aim - exact)).mean(0)
        assert float(away.norm()) < 0.12 * float(exact.norm()), step
    assert float(judged.now[:, 0].mean()) == pytest.approx(1, abs=0.02)
    # prompts whose rewards, and with them their log Z, differ by a constant
    two = replace(draw, slot=torch.arange(len(x)) % 2)
    shift = 3.0 * two.slot[:, None]
    plain, shifted = (
        Course.of(two, replace(field, score=field.score + by)).judged(weight, beta, steps)
        for by in (0 * shift, shift)
    )
    torch.testing.assert_close(shifted.end, plain.end, rtol=1e-4, atol=1e-4)


def test_the_aim_is_the_targets_step_where_the_step_is_long() -> None:
    """One step from noise to ±1, the reward its sign: the gradient where the step begins is not
    what the target does, that where it ends is (Stein's identity)."""
    noise_of_step = noise(200_000)
    centre = 0.3
    x_next = centre + noise_of_step  # σ = 1, then ĥ(x) = exp(1.2 tanh x), known
    score = x_next
    exact_weight = (1.2 * score - 0.2 * score.square()).exp()
    weight = exact_weight / exact_weight.mean()
    course = Course(torch.stack([score * 0, score], 1), score[:, None][:, :0], told=0.0)
    judged = course.judged(weight, 1.0, 1)
    aim = float(judged.end.double().mean()) / float(judged.now.double().mean())
    exact = float((weight * noise_of_step).mean())
    assert aim == pytest.approx(exact, abs=0.02)
    assert abs(1.2 - 0.4 * centre - exact) > 0.2  # the gradient of log ĥ where the step begins


def test_the_first_state_gets_the_mean_that_it_has_in_the_target() -> None:
    """Where the weight is not exp of a line, and β is not 1: E[w x_0], by Stein's identity."""
    x, beta = noise(200_000), 2.0
    weight = (1.2 * x - 0.2 * x.square()).exp()
    weight = weight / weight.mean()
    course = Course(torch.stack([x / beta, 0 * x], 1), (0 * x + 1 / beta)[:, None], told=0.0)
    exact = float((weight * x).mean())
    assert course.start(weight, beta, 1.0).item() == pytest.approx(exact, abs=0.01)
    assert abs(1.2 - exact) > 0.2  # the mean slope without the weight


def test_what_the_first_state_tells_is_made_up_for() -> None:
    known = Known.of()
    x, u, _ = walked(known, torch.zeros(4, dtype=torch.float64))
    few = slice(0, 400)
    slot = torch.zeros(400, dtype=torch.long)
    field = Field(x[few, :4, 0], noise(400, 3, 4), noise(400, 0))
    reward = x[few, 0, 0] + noise(400, seed=4)  # half of it is known at once
    draw = Draw(
        x[few], u[few], u[few], slot, reward, x[few, :, 0][:, :0], torch.zeros(400, 12), x[few, :0]
    )
    course = Course.of(draw, field)
    assert course.told == pytest.approx(0.5, abs=0.1)
    weight = (reward - reward.logsumexp(0)).exp() * 400
    made_up = course.judged(weight, 1.0, 12)
    plain = replace(course, told=0.0).judged(weight, 1.0, 12)
    assert plain.end[:, :3].abs().sum() > 0 and not made_up.end[:, 3:].any()
    torch.testing.assert_close(made_up.end, plain.end / (1 - course.told))


# ------------------------------------------------------------------------------------- the pool


@pytest.mark.parametrize("shift", [False, True])
def test_the_pool_keeps_scores_and_gradients_of_predicted_samples(
    tmp_path: Path, shift: bool
) -> None:
    """J_x̂ᵀ a by finite differences, at the path's own state and prompt."""
    made = collector(options(tmp_path, pool__shift_start=shift), tmp_path, gradients="linear")
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
        wanted = centred(score(x, step + 1), base.slot)
        torch.testing.assert_close(made._course.score[:, step + 1].float(), wanted)
    at_first = centred(score(base.x[:, 0], 0), base.slot)
    torch.testing.assert_close(made._course.score[:, 0].float(), at_first)
    torch.testing.assert_close(base.gradient[:, -1], fitted.slope.expand_as(base.x[:, -1]))


def test_the_policys_first_state_moves_where_the_fit_says(tmp_path: Path) -> None:
    """To the mean of ĥ_0 ∇ log ĥ_0, with β, whatever the process; not without the option."""
    still = collector(options(), tmp_path / "still", gradients="linear")
    still.collect(0)
    assert still.policy.first.mean is None
    made = collector(options(pool__shift_start=True), tmp_path, gradients="linear")
    made.over_processes = lambda mean: 2 * mean
    made.collect(0)
    base, course, mean = made._base, made._course, made.policy.first.mean
    assert base is not None and course is not None and mean is not None
    assert course.told == 0 and mean.shape == made.policy.sample_shape
    weight = mean_one(made._log_weight(base), base.slot)
    torch.testing.assert_close(mean, 2 * course.start(weight, 2.0, 1.0))
    x, size = base.x[:, 0], 1e-2
    fitted = LinearReward.fit(base.x[:, -1], base.reward)
    condition = made.policy.condition([made.slots[i] for i in base.slot.tolist()], [{}] * len(x))
    k, scores = made.table.at_step(0, x), []
    for by in (-size, size):
        moved = x.clone()
        moved.flatten(1)[:, 0] += by
        with torch.no_grad(), made.policy.reference():
            u = made.policy.output(moved, k.here.time, condition)
        scores.append((kernels.predict_clean(moved, u, k.here) * fitted.slope).flatten(1).sum(1))
    slope = (scores[1] - scores[0]) / (2 * size)
    torch.testing.assert_close(course.first.flatten(1)[:, 0], slope, rtol=2e-2, atol=2e-3)
    made.policy.first.mean = None  # as a policy that goes back to before it had one
    made.collect(0)
    assert torch.equal(made.policy.first.mean, mean)
    made.log_reward = replace(made.log_reward, temper=lambda: 0.0)
    made.collect(1)
    assert float(made.policy.first.mean.abs().max()) < 1e-6 < float(mean.abs().max())


def test_a_policy_without_a_first_state_is_told_of(tmp_path: Path) -> None:
    policy = PromptedWorld(hidden=8)
    del policy.first
    made = partial(collector, options(pool__shift_start=True), tmp_path, policy)
    with pytest.raises(ConfigError, match="shift_start=True needs a policy with a `first`"):
        made(gradients="linear")
    made(gradients="carried")


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


@pytest.mark.parametrize("shift", [False, True])
def test_it_goes_on_bit_for_bit_and_makes_damaged_files_again(tmp_path: Path, shift: bool) -> None:
    chosen = {**LINEAR, "pool__shift_start": shift}
    whole = trained(options(tmp_path / "whole", **chosen))
    assert (KEY in whole) == shift
    trained(options(tmp_path / "parts", training__num_epochs=3, **chosen))
    files = sorted((tmp_path / "parts").rglob("pool/rank00_linear_*"))
    assert files
    files[0].write_bytes(b"x")
    again = trained(options(tmp_path / "parts", **chosen))
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
        ({"experiment.method": "reward-weighted", "pool.shift_start": True}, "no use in"),
        (
            {"pool.gradient": "carried", "pool.shift_start": True},
            "needs config.pool.gradient=linear",
        ),
    ],
)
def test_what_does_not_go_with_it_is_one_line(changes: dict[str, object], words: str) -> None:
    config: Config = options(**LINEAR)
    for key, value in changes.items():
        set_option(config, key, value)
    with pytest.raises(ConfigError) as raised:
        check_settings(config)
    assert words in str(raised.value) and "\n" not in str(raised.value)
