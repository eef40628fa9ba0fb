"""The pool of paths, and the regression on its weighted paths, against what is known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nablagfn.config import Config, ConfigError, set_option
from nablagfn.core import kernels
from nablagfn.core.bellman import adjoint, returns
from nablagfn.core.kernels import KernelTable
from nablagfn.core.log_reward import LogReward
from nablagfn.core.lookahead import How, guess, shift_size, shifted
from nablagfn.core.rollout import rollout
from nablagfn.core.schedules import Levels
from nablagfn.core.types import Condition, Policy, Pooled, Selection, Trajectories, Transitions
from nablagfn.methods.build import build_kernel
from nablagfn.methods.objectives.reweighted import (
    Carrying,
    PoolSignals,
    ReweightedRegression,
)
from nablagfn.methods.registry import check_settings, find_method, source_of
from nablagfn.prompts import PromptSet
from nablagfn.training.collect import ignored
from nablagfn.training.draws import Draw, Shelf
from nablagfn.training.pool import PoolCollector, Shares, mean_one
from nablagfn.training.trainer import Trainer
from nablagfn.training.updater import TrainingError
from nablagfn.worlds import load
from nablagfn.worlds.mixture import Mixture
from nablagfn.worlds.policy import WorldPolicy
from tests.worlds import PromptedWorld, tilt

STEPS = 6


def options(out: Path = Path(), **more: object) -> Config:
    config = Config()
    values = {
        "experiment.method": "reward-weighted",
        "model.reward_scale": 2.0,
        "model.unet_reg_scale": 0.0,
        "model.timestep_fraction": 0.5,
        "sampling.num_steps": STEPS,
        "sampling.guidance_scale": 1.0,
        "sampling.batch_size": 6,
        "sampling.num_batches_per_epoch": 1,
        "training.batch_size": 6,
        "training.gradient_accumulation_steps": 1,
        "training.num_epochs": 4,
        "training.lr": 0.05,
        "pool.size": 12,
        "pool.images_per_prompt": 4,
        "logging.tensorboard": False,
        "logging.sample_freq": 0,
        "logging.save_freq": 1,
        "evaluation.num_prompts": 0,
        "saving.output_dir": str(out),
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    for key, value in values.items():
        set_option(config, key, value)
    return config


PROMPTS = PromptSet(("a cat", "a duck", "ants"))


def trainer(config: Config) -> Trainer:
    return Trainer(PromptedWorld(hidden=8), tilt, PROMPTS, config, show_progress=False)


def transitions(
    made: Trainer, drawn: Trajectories, epoch: int = 0
) -> tuple[Selection, Transitions]:
    """Those of an epoch's only update."""
    (chosen,) = made.collector.batches(drawn, epoch, 0, made.objective)
    return chosen, chosen.transitions(made.objective.prepare(chosen))


def collector(
    config: Config,
    out: Path,
    policy: Policy | None = None,
    rank: int = 0,
    world: int = 1,
    gradients: str = "none",
) -> PoolCollector:
    policy = policy or PromptedWorld(hidden=8)
    return PoolCollector(
        policy,
        build_kernel(config, policy),
        PROMPTS,
        config,
        log_reward=LogReward(policy, tilt, config.model.reward_scale),
        gradients=gradients,
        shelf=Shelf(out / "pool", rank),
        world=world,
    )


# -------------------------------------------------------------------------- algebra beside the end


def world_table(name: str, num_steps: int = 12) -> tuple[WorldPolicy, KernelTable]:
    policy = WorldPolicy(load(name))
    policy.to("cpu", torch.float64)
    config = Config()
    config.sampling.num_steps = num_steps
    return policy, build_kernel(config, policy)


@pytest.mark.parametrize("name", ["worlds/ring", "worlds/ring-flow"])
def test_levels_relative_to_the_end_are_those_of_the_joint_gaussian(name: str) -> None:
    """(x_clean, x_N, x_{k+1}, x_k) of the forward process, conditioned by its covariance."""
    _, table = world_table(name)
    alpha, sigma = table.schedule.alpha, table.schedule.sigma
    for step in range(table.num_steps):
        k = table.at_step(step, torch.zeros(1, dtype=torch.float64))
        v = 0.7  # of x_clean
        order = [table.num_steps, step + 1, step]
        joint = torch.zeros(4, 4, dtype=torch.float64)
        joint[0, 0] = v
        for i, level in enumerate(order, 1):
            joint[0, i] = joint[i, 0] = alpha[level] * v
            for j, other in enumerate(order, 1):
                clean, noisy = max(level, other), min(level, other)
                back = alpha[noisy] / alpha[clean] if noisy < clean else 1.0
                joint[i, j] = back * (alpha[clean] ** 2 * v + sigma[clean] ** 2)

        def regress(target: int, given: list[int], joint: Tensor = joint) -> Tensor:
            return torch.linalg.solve(joint[given][:, given], joint[given, target])

        clean_x, end_x = float(regress(0, [3])[0]), float(regress(1, [3])[0])
        predicted = float(k.here.end_x) + float(k.here.end_clean) * clean_x
        assert predicted == pytest.approx(end_x, abs=1e-12)
        if step + 1 < table.num_steps:
            on_end, on_x = regress(2, [1, 3]).tolist()
            assert float(k.bridge_x) == pytest.approx(on_x, abs=1e-10)
            assert float(k.bridge_end) == pytest.approx(on_end, abs=1e-10)
        spread = float(joint[3, 3] - k.here.end_scale**2 * joint[1, 1])
        assert float(k.here.end_std) ** 2 == pytest.approx(spread, abs=1e-12)
    assert float(k.bridge_x) == 0 and float(k.bridge_end) == 1  # the last step: x_{k+1} is x_N


def tilted_gradient(
    policy: WorldPolicy, table: KernelTable, x: Tensor, step: int, b: Tensor
) -> Tensor:
    """∇ log E[exp(b·x_N)|x_k = x] in closed form: log-densities of two mixtures, differentiated."""
    alpha, sigma = float(table.schedule.alpha[-1]), float(table.schedule.sigma[-1])
    end = policy.world.mixture.noised(alpha, sigma)
    pull = end.means @ b
    weights = (end.weights.log() + pull).softmax(0)
    moved = Mixture(end.means + end.variances * b, weights, end.variances)
    k = table.at_step(step, x)
    levels = Levels(k.here.end_scale.expand(len(x), 1), k.here.end_std.expand(len(x), 1))
    x = x.clone().requires_grad_()
    value = moved.log_density(x, levels) - end.log_density(x, levels)
    return torch.autograd.grad(value.sum(), x)[0]


def shift_of(
    policy: WorldPolicy, table: KernelTable, x: Tensor, step: int, b: Tensor, cap: float
) -> Tensor:
    k = table.at_step(step, x)
    where = policy.condition([policy.world.prompts[0]] * len(x))

    def clean(x: Tensor) -> Tensor:
        with policy.reference(), torch.no_grad():
            return kernels.predict_clean(x, policy.output(x, k.here.time, where), k.here)

    return shifted(b.expand_as(x), k.here, cap, lambda shift: clean(x + shift) - clean(x))


@pytest.mark.parametrize("name", ["worlds/mixture-16d", "worlds/ring", "worlds/ring-flow"])
def test_the_shifted_guess_is_exact_for_a_linear_reward_and_any_modes(name: str) -> None:
    policy, table = world_table(name)
    generator = torch.Generator().manual_seed(0)
    b = 1.3 * torch.randn(policy.world.dim, generator=generator, dtype=torch.float64)
    for step in range(1, table.num_steps):
        k = table.at_step(step, b[None])
        end = policy.world.mixture.sample(40, generator)
        x = k.here.end_scale * end
        x = x + k.here.end_std * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        found = shift_of(policy, table, x, step, b, cap=1e9)
        torch.testing.assert_close(
            found, tilted_gradient(policy, table, x, step, b), rtol=1e-8, atol=1e-9
        )


def test_a_held_back_shift_is_between_the_gradient_and_the_whole_one() -> None:
    policy, table = world_table("worlds/ring")
    b = torch.tensor([1.0, 0.0], dtype=torch.float64)
    x = torch.tensor([[0.4, 0.3], [1.0, -0.2]], dtype=torch.float64)
    for step in (3, 8):
        k = table.at_step(step, x)
        leaf = x.clone().requires_grad_()
        with policy.reference(), torch.enable_grad():
            output = policy.output(leaf, k.here.time, policy.condition(["east"] * 2))
            end = kernels.predict_end(leaf, output, k.here)
        (gradient,) = torch.autograd.grad((end @ b).sum(), leaf)
        torch.testing.assert_close(
            shift_of(policy, table, x, step, b, 1e-7), gradient, rtol=1e-4, atol=1e-6
        )
        size = shift_size(b.expand_as(x), k.here, 0.1)
        length = (size * b).square().mean(1).sqrt()
        assert float(length.max()) <= 0.1 * float(k.here.end_std) * (1 + 1e-9)


def test_without_signal_the_shifted_guess_is_finite_and_zero() -> None:
    policy, table = world_table("worlds/ring-flow")
    x = torch.tensor([[0.4, 0.3]], dtype=torch.float64)
    found = shift_of(policy, table, x, 0, torch.ones(2, dtype=torch.float64), 1.0)
    assert float(found.abs().max()) < 1e-12


@pytest.mark.parametrize("kind", ["shifted", "no-jacobian"])
def test_a_guess_without_a_backward_pass_ends_on_the_gradient_itself(kind: str) -> None:
    policy, table = world_table("worlds/ring")
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    where = policy.condition(["east"] * 3)

    def reward(images: Tensor, prompts: object, metadata: object) -> Tensor:
        return -(images - 0.5).square().sum(1)

    log_reward = LogReward(policy, reward, 2.0)
    k = table.at_step(table.num_steps - 1, x)
    found = guess(log_reward, policy, x, k, where, "squared", How(kind))  # type: ignore[arg-type]
    torch.testing.assert_close(found.gradient, -4 * (x - 0.5))
    inside = table.at_step(5, x)
    found = guess(log_reward, policy, x, inside, where, "squared", How(kind, 1e-7))  # type: ignore[arg-type]
    slope = -4 * (found.x_clean - 0.5)
    if kind == "no-jacobian":
        torch.testing.assert_close(found.gradient, inside.next.alpha_bar * slope)
    else:
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            output = policy.output(leaf, inside.next.time, where)
            end = kernels.predict_end(leaf, output, inside.next)
        (known,) = torch.autograd.grad(end, leaf, slope)
        known = inside.next.alpha_bar * known
        torch.testing.assert_close(found.gradient, known, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------- the regression


def quadrature(count: int = 60) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E[f(z)], z normal."""
    from numpy.polynomial.hermite_e import hermegauss

    nodes, weights = hermegauss(count)
    found = torch.tensor(weights) / math.sqrt(2 * math.pi)
    return torch.tensor(nodes), found


@pytest.mark.parametrize("control", [0.0, 1.0])
@pytest.mark.parametrize("step", [1, 4, 9])
def test_the_regression_ends_at_the_targets_own_step(step: int, control: float) -> None:
    """x_N given x_k by quadrature, w of a two-peaked reward: E[w]·d* − E[t] is 0 at the shift
    E[w z̄]/E[w], whatever the control takes off, and at no multiple of it."""
    policy, table = world_table("worlds/gaussian")
    x = torch.tensor([[0.3, -0.2, 0.4, 0.8]], dtype=torch.float64)
    where = policy.condition(policy.world.prompts)
    k = table.at_step(step, x)
    alpha, sigma = float(table.schedule.alpha[-1]), float(table.schedule.sigma[-1])
    end = policy.world.mixture.noised(alpha, sigma)
    a, s = float(k.here.end_scale), float(k.here.end_std)
    variance = 1 / (1 / end.variances + a**2 / s**2)
    mean = variance * (end.means[0] / end.variances + a * x[0] / s**2)
    nodes, chance = quadrature()
    x_end = mean.expand(len(nodes), 4).clone()
    x_end[:, 1] = mean[1] + variance[1].sqrt() * nodes  # the others at their means: none depends
    weight = (-(x_end[:, 1].square() - 0.4).square() * 8).exp() * 3
    with policy.reference(), torch.no_grad():
        output = policy.output(x, k.here.time, where)
    rows = len(nodes)
    batch, known = one_place(x, output, x_end, weight, control, step, where, rows)
    objective = ReweightedRegression(policy, table, weight="std", fraction=1.0)
    aimed = objective.aimed(batch, known, table.at(batch.step, batch.x))
    found = (chance[:, None] * aimed).sum(0) / (chance * weight).sum()
    posterior = ((chance * weight)[:, None] * x_end).sum(0) / (chance * weight).sum()
    exact = float(k.bridge_end / k.std) * (posterior - mean)
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-9)
    assert abs(float(exact[1])) > 1e-3


def one_place(
    x: Tensor,
    output: Tensor,
    x_end: Tensor,
    weight: Tensor,
    control: float,
    step: int,
    where: Condition,
    rows: int,
) -> tuple[Transitions, PoolSignals]:
    same = output.expand(rows, -1)
    known = PoolSignals(
        x_end,
        same,
        torch.ones(rows, dtype=torch.bool),
        weight,
        torch.full_like(weight, control),
        weight,
        torch.ones_like(weight),
        gradient=torch.zeros_like(x_end),
    )
    place = torch.zeros(rows, dtype=torch.long)
    batch = Transitions(
        x.expand(rows, -1), x_end, same, torch.full((rows,), step), where[place], known
    )
    return batch, known


def test_the_control_takes_off_what_a_policy_of_its_own_has_moved() -> None:
    """Of own paths z̄ has the mean d†: taken off whole it would leave a pull back to the base."""
    policy, table = world_table("worlds/gaussian")
    x = torch.zeros(1, 4, dtype=torch.float64)
    where = policy.condition(policy.world.prompts)
    k = table.at_step(5, x)
    with policy.reference(), torch.no_grad():
        output = policy.output(x, k.here.time, where)
    end = kernels.predict_end(x, output, k.here) + 0.1
    batch, known = one_place(x, output, end, torch.ones(1, dtype=torch.float64), 1.0, 5, where, 1)
    moved = Transitions(
        batch.x, batch.x_next, batch.output_old + 0.2, batch.step, batch.condition, known
    )
    objective = ReweightedRegression(policy, table, weight="std", fraction=1.0)
    k = table.at(batch.step, batch.x)
    aimed = objective.aimed(moved, known, k)
    torch.testing.assert_close(aimed, kernels.moved_mean(moved.output_old, known.output_ref, k))


# ------------------------------------------------------------------- the gradient along a path


def rows_of(policy: WorldPolicy, table: KernelTable, count: int, step: int) -> Trajectories:
    """Paths of the pretrained model that share their first `step` + 1 states."""
    noise = torch.randn(count, table.num_steps + 1, 2, generator=torch.Generator().manual_seed(1))
    noise[:, : step + 1] = noise[:1, : step + 1]
    where = policy.condition(policy.world.prompts * count)
    with policy.reference():
        return rollout(policy, table, noise.double(), where)


def carried_along(policy: WorldPolicy, table: KernelTable, paths: Trajectories) -> Tensor:
    """λ_{k+1} of r(x) = x₁, [n, N, 2]."""
    end = torch.zeros_like(paths.clean)
    end[:, 0] = 1
    first = torch.zeros(len(end), dtype=torch.long)
    found = returns(policy, table, paths.x, first, paths.condition, end, adjoint)
    return found.mixed[:, 1:]


@pytest.mark.parametrize("step", [1, 5, 9])
def test_weight_and_carried_gradient_give_the_target_step_as_noise_does(step: int) -> None:
    """From one state on, in worlds/ring: E[w σλ]/E[w] = E[w z]/E[w], and with less noise."""
    policy, table = world_table("worlds/ring")
    count = 40_000
    paths = rows_of(policy, table, count, step)
    x, u = paths.x[:, step], paths.output[:, step]
    k = table.at_step(step, x)
    w = (1.5 * paths.clean[:, 0]).exp()
    w = w / w.mean()
    reward = LogReward(policy, lambda images, prompts, metadata: images[:, 0], 1.5)
    aim = w[:, None] * Carrying(reward, 1.0, 0.0).aim(
        carried_along(policy, table, paths)[:, step], k
    )
    z = w[:, None] * kernels.step_noise(x, paths.x[:, step + 1], u, k)
    error = z.std(0) / count**0.5
    assert bool(((aim.mean(0) - z.mean(0)).abs() < 4 * error).all())
    assert float(z.mean(0).norm()) > 8 * float(error.norm()), "there is something to find"
    assert float(aim.std(0).norm()) < 0.7 * float(z.std(0).norm())


def test_a_long_gradient_is_shortened_to_the_cap() -> None:
    policy, table = world_table("worlds/ring")
    x = torch.zeros(3, 2, dtype=torch.float64)
    k = table.at_step(5, x)
    gradient = torch.tensor([[3.0, 4.0], [0.3, -0.4], [0.0, 0.0]], dtype=torch.float64)
    reward = LogReward(policy, lambda images, prompts, metadata: images[:, 0], 2.0)
    whole = Carrying(reward, 1.0, 0.0).aim(gradient, k)
    torch.testing.assert_close(whole, 2 * k.std * gradient)
    cap = float(whole[1].norm()) * 2
    found = Carrying(reward, 1.0, cap).aim(gradient, k)
    torch.testing.assert_close(found[1:], whole[1:])
    torch.testing.assert_close(found[0], cap * torch.tensor([0.6, 0.8], dtype=torch.float64))


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_aim_has_its_share_of_the_carried_gradient(share: float) -> None:
    policy, table = world_table("worlds/gaussian")
    where = policy.condition(policy.world.prompts)
    reward = LogReward(policy, lambda images, prompts, metadata: images[:, 0], 2.0)
    both = ReweightedRegression(
        policy, table, weight="std", fraction=1.0, carrying=Carrying(reward, share, 0.3)
    )
    plain = ReweightedRegression(policy, table, weight="std", fraction=1.0)
    x = torch.full((1, 4), 0.3, dtype=torch.float64)
    k = table.at_step(5, x)
    with policy.reference(), torch.no_grad():
        output = policy.output(x, k.here.time, where)
    weight = torch.full((1,), 2.0, dtype=torch.float64)
    batch, known = one_place(x, output, x + 0.5, weight, 1.0, 5, where, 1)
    gradient = torch.tensor([[1.0, 0.0, -2.0, 0.0]], dtype=torch.float64)
    known = replace(known, gradient=gradient, end=torch.full((1,), 3.0, dtype=torch.float64))
    assert both.carrying is not None
    wanted = share * 3.0 * both.carrying.aim(gradient, k)
    wanted = wanted + (1 - share) * plain.aimed(batch, known, k)
    torch.testing.assert_close(both.aimed(batch, known, k), wanted)


def test_a_pool_keeps_the_gradient_at_what_each_step_led_to(tmp_path: Path) -> None:
    """Of x_N as a function of x_{k+1}, the later noise being what it was; by the pretrained model,
    also along the policy's own paths."""
    policy = PromptedWorld(hidden=8)
    config = options(pool__own_share=1.0, pool__refresh=1)
    made = collector(config, tmp_path, policy, gradients="carried")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2)
    drawn = made.collect(1)
    assert made.fresh == 0 and drawn.pooled is not None and drawn.pooled.gradient is not None
    assert drawn.pooled.own.any() and not drawn.pooled.own.all()
    assert drawn.pooled.gradient.shape == drawn.pooled.output_ref.shape
    for start in (1, STEPS - 1, STEPS):
        leaf = x = drawn.x[:, start].clone().requires_grad_()
        with policy.reference():
            for step in range(start, STEPS):
                k = made.table.at_step(step, x)
                here = drawn.x[:, step]
                with torch.no_grad():
                    known = policy.output(here, k.here.time, drawn.condition)
                noise = kernels.step_noise(here, drawn.x[:, step + 1], known, k)
                mean = kernels.mean(x, policy.output(x, k.here.time, drawn.condition), k)
                x = mean + k.std * noise
        value = tilt(x, drawn.condition.prompts, []).sum()
        (wanted,) = torch.autograd.grad(value, leaf)
        torch.testing.assert_close(
            drawn.pooled.gradient[:, start - 1], wanted, rtol=1e-4, atol=1e-5
        )


def test_a_transition_has_the_gradient_of_what_its_own_step_led_to(tmp_path: Path) -> None:
    made = trainer(options(tmp_path, experiment__method="nabla-db-pool"))
    drawn = made.collector.collect(0)
    chosen, batch = transitions(made, drawn, 0)
    signals, pooled = batch.signals, chosen.paths.pooled
    assert isinstance(signals, PoolSignals) and signals.gradient is not None
    assert pooled is not None and pooled.gradient is not None and signals.known is None
    for i, (row, step) in enumerate(zip(chosen.row.tolist(), chosen.step.tolist(), strict=True)):
        assert torch.equal(signals.gradient[i], pooled.gradient[row, step])
    made.counts.take()
    made.objective.losses(batch)
    assert made.counts.take()["model_evals"] == len(batch), "u_# is known"


def test_paths_without_carried_gradients_are_drawn_again(tmp_path: Path) -> None:
    """Also those of a release that kept the gradient at the end alone, or of the other method."""
    made = collector(options(), tmp_path, gradients="carried")
    made.collect(0)
    (file, *_) = sorted((tmp_path / "pool").glob("*.safetensors"))
    before = file.read_bytes()
    collector(options(), tmp_path).collect(0)
    assert file.read_bytes() != before
    collector(options(), tmp_path, gradients="carried").collect(0)
    assert file.read_bytes() == before


def test_without_a_share_of_the_gradient_none_is_asked_for(tmp_path: Path) -> None:
    config = options(tmp_path, experiment__method="nabla-db-pool", pool__gradient_share=0.0)
    made = trainer(config)
    assert not made.objective.carries_gradient and not made.objective.uses_reward_gradient
    assert isinstance(made.collector, PoolCollector) and made.collector.fresh > 0


def goes_on_with_fewer_rows(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    gradients: str,
    name: str,
    rows: Callable[..., int],
) -> None:
    """The collector's method `name` has memory for two rows, and what is found is the same. rows:
    how many it is asked for, by its arguments."""
    whole = collector(options(), tmp_path / "whole", gradients=gradients).collect(0)
    made = collector(options(), tmp_path / "small", gradients=gradients)
    plain = getattr(made, name)

    def small(*given: object) -> object:
        if rows(*given) > 2:
            raise torch.OutOfMemoryError
        return plain(*given)

    setattr(made, name, small)
    found = made.collect(0)
    assert found.pooled is not None and whole.pooled is not None
    assert found.pooled.gradient is not None and whole.pooled.gradient is not None
    torch.testing.assert_close(found.pooled.gradient, whole.pooled.gradient)
    assert made._rows <= 2 and "out of memory" in capsys.readouterr().out


def test_filling_goes_on_with_fewer_rows_where_memory_runs_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goes_on_with_fewer_rows(tmp_path, capsys, "carried", "_rewards_by", lambda paths, size: size)


def test_a_run_of_nabla_db_pool_goes_on_bit_for_bit(tmp_path: Path) -> None:
    more = {
        "experiment__method": "nabla-db-pool",
        "pool__own_share": 0.5,
        "pool__refresh": 1,
        "pool__looks": 2,
        "pool__gradient_share": 0.7,
    }
    whole = trained(options(tmp_path / "whole", **more))
    trained(options(tmp_path / "parts", training__num_epochs=3, **more))
    again = trained(options(tmp_path / "parts", **more))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    other = trained(options(tmp_path / "other", **{**more, "pool__gradient_cap": 0.01}))
    assert any(not torch.equal(whole[name], other[name]) for name in whole)


# ------------------------------------------------------------------------------------- weights


def test_weights_have_mean_one_within_each_prompt_and_shares_keep_every_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    log_w = 3 * torch.randn(30, generator=generator, dtype=torch.float64)
    log_w[:10] += 500  # another prompt has another normaliser
    slot = torch.arange(3).repeat_interleave(10)
    weight = mean_one(log_w, slot)
    torch.testing.assert_close(weight.reshape(3, 10).mean(1), torch.ones(3))
    exact = (log_w[10:20] - log_w[10:20].logsumexp(0)).exp() * 10
    torch.testing.assert_close(weight[10:20], exact.float())
    for how in (0.0, 0.5, 0.9):
        shares = Shares.of(log_w, slot, how)
        assert float(shares.probability.mean()) == pytest.approx(1, abs=1e-6)
        assert float(shares.probability.min()) >= 1 - how - 1e-6
        value = torch.randn(30, generator=generator)
        taken = shares.probability * (shares.weight / shares.probability) * value
        torch.testing.assert_close(taken.mean(), (weight * value).mean())
    half = Shares.of(log_w, slot, 0.5)
    assert float((half.weight / half.probability).max()) <= 2 + 1e-6


def test_every_path_has_the_prompt_that_it_was_drawn_and_scored_with(tmp_path: Path) -> None:
    config = options()
    policy = PromptedWorld(hidden=8)
    made = collector(config, tmp_path, policy)
    drawn = made.collect(0)
    assert 0 < made.fresh < STEPS - 1
    pooled = drawn.pooled
    assert isinstance(pooled, Pooled) and drawn.reward is not None
    assert len({*drawn.condition.prompts}) == 3
    for k in range(made.fresh, STEPS):
        with policy.reference(), torch.no_grad():
            time = made.table.time[k].expand(len(drawn.x))
            known = policy.output(drawn.x[:, k], time, drawn.condition)
        torch.testing.assert_close(pooled.output_ref[:, k], known)
    torch.testing.assert_close(drawn.reward, tilt(drawn.clean, drawn.condition.prompts, []).float())
    assert pooled.gradient is None


def test_new_states_are_those_of_the_forward_process_from_the_paths_own(tmp_path: Path) -> None:
    config = options(pool__size=900, pool__images_per_prompt=300, sampling__batch_size=900)
    made = collector(config, tmp_path)
    first, second = made.collect(0), made.collect(1)
    assert made._base is not None and made.fresh == 2
    kept = {tuple(x.flatten().tolist()) for x in made._base.x[:, made.fresh :]}
    assert all(tuple(x.flatten().tolist()) in kept for x in first.x[:, made.fresh :])
    assert not torch.isin(first.x[:, 0], second.x[:, 0]).any()
    k = made.table.at_step(1, first.x[:, 0])
    left = (first.x[:, 1] - k.back_x * first.x[:, 2]) / k.back_std
    assert abs(float(left.mean())) < 0.1 and float(left.std()) == pytest.approx(1, abs=0.06)
    later = made.table.at_step(0, first.x[:, 0])
    left = (first.x[:, 0] - later.back_x * first.x[:, 1]) / later.back_std
    assert float(left.std()) == pytest.approx(1, abs=0.06)


def test_the_reference_is_evaluated_where_states_are_new_and_only_there(tmp_path: Path) -> None:
    """Losses of new states, completed by the objective, are those with everything known."""
    made = trainer(options(tmp_path, model__timestep_fraction=1.0))
    drawn = made.collector.collect(0)
    _, batch = transitions(made, drawn)
    known = batch.signals
    assert isinstance(known, PoolSignals) and 0 < int(known.known.sum()) < len(batch)
    made.counts.take()
    found = made.objective.losses(batch).total()
    new = len(batch) - int(known.known.sum())
    assert made.counts.take()["model_evals"] == len(batch) + new
    with made.policy.reference(), torch.no_grad():
        time = made.table.time[batch.step]
        exact = made.policy.output(batch.x, time, batch.condition)
    everything = replace(
        batch,
        output_old=exact,
        signals=replace(known, output_ref=exact, known=torch.ones_like(known.known)),
    )
    torch.testing.assert_close(made.objective.losses(everything).total(), found)


def test_the_slope_is_found_again_and_noise_is_not_taken_for_one() -> None:
    _, table = world_table("worlds/ring")
    generator = torch.Generator().manual_seed(0)
    k = table.at_step(5, torch.zeros(4000, 2, dtype=torch.float64))

    def normal() -> Tensor:
        return torch.randn(4000, 2, generator=generator, dtype=torch.float64)

    x, end, output = normal(), normal(), normal()
    seen = kernels.bridge_noise(x, end, output, k)
    rest = 0.3 * float(seen.std()) * normal()
    for slope in (0.65, 1.2):
        x_next = kernels.mean(x, output, k) + k.std * (slope * seen + rest)
        assert kernels.bridge_slope(x, x_next, end, output, k) == pytest.approx(slope, abs=0.02)
    loud = 30 * float(seen.std()) * normal()
    x_next = kernels.mean(x, output, k) + k.std * (seen + loud)
    raw = float(((seen + loud) * seen).sum() / seen.square().sum())
    found = kernels.bridge_slope(x, x_next, end, output, k)
    assert abs(found - 1) < 0.6 * abs(raw - 1)


def test_the_pool_measures_the_slope_of_each_step(tmp_path: Path) -> None:
    made = collector(options(pool__size=1200, pool__images_per_prompt=400), tmp_path)
    pooled = made.collect(0).pooled
    assert pooled is not None and made._base is not None
    base = made._base
    for step in range(STEPS):
        k = made.table.at_step(step, base.x[:, step])
        rows = (base.x[:, step], base.x[:, step + 1], base.x[:, -1], base.output_ref[:, step])
        assert float(pooled.slope[step]) == pytest.approx(kernels.bridge_slope(*rows, k))


def test_own_paths_carry_their_path_weight(tmp_path: Path) -> None:
    """E over own paths of p_#/p_θ is 1: their weights forget the policy that drew them."""
    config = options(
        pool__own_share=1.0, pool__refresh=1, pool__size=1200, sampling__batch_size=300
    )
    set_option(config, "pool.images_per_prompt", 400)
    policy = PromptedWorld(hidden=8)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05)
    made = collector(config, tmp_path, policy)
    own = made._drawn(1, ignored)
    ratio = (-own.log_ratio.sum(1)).exp()
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert float(ratio.log().std()) > 0.05, "the policy has moved"
    assert abs(float(ratio.mean()) - 1) < 4 * error
    assert not torch.equal(own.output, own.output_ref)


def test_the_loss_is_the_weighted_regression(tmp_path: Path) -> None:
    made = trainer(options(tmp_path, model__timestep_fraction=1.0, pool__renoise=0.0))
    with torch.no_grad():
        for parameter in made.policy.parameters():
            parameter.add_(0.1)
    drawn = made.collector.collect(0)
    _, batch = transitions(made, drawn)
    known, objective = batch.signals, made.objective
    assert isinstance(known, PoolSignals) and isinstance(objective, ReweightedRegression)
    known = replace(known, slope=torch.linspace(0.2, 0.8, len(known.weight)))
    batch = replace(batch, signals=known)
    k = made.table.at(batch.step, batch.x)
    assert known.slope is not None
    seen = known.slope[:, None] * kernels.bridge_noise(batch.x, known.x_end, known.output_ref, k)
    away = kernels.moved_mean(batch.output_old, known.output_ref, k)
    aim = known.weight[:, None] * seen - known.control[:, None] * (seen - away)
    torch.testing.assert_close(objective.aimed(batch, known, k), aim)
    with torch.no_grad():
        output = made.policy.output(batch.x, made.table.time[batch.step], batch.condition)
        d, t = kernels.moved_mean(output, known.output_ref, k), objective.aimed(batch, known, k)
        value = known.weight[:, None] * d.square() - 2 * d * t
        assert float((known.weight - 1).abs().max()) > 0.1
        torch.testing.assert_close(objective.losses(batch).total(), value.mean(1))


def test_own_paths_are_weighed_by_reward_and_ratio_and_uncontrolled_where_new(
    tmp_path: Path,
) -> None:
    config = options(tmp_path, pool__own_share=1.0, pool__refresh=1, model__timestep_fraction=1.0)
    set_option(config, "sampling.batch_size", 24)
    set_option(config, "training.batch_size", 24)
    made = trainer(config)
    with torch.no_grad():
        for parameter in made.policy.parameters():
            parameter.add_(0.1)
    collected = made.collector
    assert isinstance(collected, PoolCollector)
    drawn = collected.collect(1)
    own = collected._own[1]
    known = config.model.reward_scale * own.reward.double() - own.log_ratio.sum(1)
    assert float(own.log_ratio.abs().max()) > 1e-3
    torch.testing.assert_close(collected._log_weight(own), known)

    (chosen,) = collected.batches(drawn, 1, 0, made.objective)
    signals = made.objective.prepare(chosen)
    assert isinstance(signals, PoolSignals) and chosen.paths.pooled is not None
    mine = chosen.paths.pooled.own[chosen.row]
    new = chosen.step < collected.fresh
    assert bool((mine & new).any()) and bool((mine & ~new).any()) and bool((~mine & new).any())
    assert torch.equal(signals.control == 0, mine & new)


def test_own_paths_come_and_go(tmp_path: Path) -> None:
    config = options(pool__own_share=0.5, pool__refresh=2, pool__keep_draws=2)
    made = collector(config, tmp_path)
    sizes = []
    for epoch in range(9):
        made.collect(epoch)
        sizes.append(sorted(made._own))
    assert sizes == [[], [], [2], [2], [2, 4], [2, 4], [4, 6], [4, 6], [6, 8]]
    names = sorted(file.name for file in (tmp_path / "pool").iterdir())
    assert names[0] == "rank00_base_00.safetensors" and not any("partial" in name for name in names)
    assert names[-1].startswith("rank00_epoch00008") and "epoch00002" not in "".join(names)


def test_processes_have_pools_of_their_own(tmp_path: Path) -> None:
    config = options(pool__size=4, pool__images_per_prompt=4)
    made = [collector(config, tmp_path, rank=rank, world=3) for rank in range(3)]
    assert sorted(slot for one in made for slot in one.slots) == sorted(PROMPTS.prompts)
    starts = [one.collect(0).x[:, 0] for one in made]
    assert not torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])


def test_a_damaged_pool_is_drawn_again_and_is_the_same(tmp_path: Path) -> None:
    config = options()
    first = collector(config, tmp_path).collect(0)
    file, *_ = sorted((tmp_path / "pool").iterdir())
    file.write_bytes(file.read_bytes()[:100])
    again = collector(config, tmp_path).collect(0)
    assert torch.equal(first.x, again.x) and torch.equal(first.clean, again.clean)


def test_a_filling_that_is_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    config = options(pool__size=160, sampling__batch_size=4)  # 40 batches in parts of 2
    whole = collector(config, tmp_path / "whole").collect(0)

    def cut(done: int, total: int) -> None:
        assert total == 40
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collector(config, tmp_path / "parts").collect(0, cut)
    asked: list[int] = []
    again = collector(config, tmp_path / "parts").collect(0, lambda done, _: asked.append(done))
    assert asked == list(range(6, 40))
    assert torch.equal(whole.x, again.x) and torch.equal(whole.clean, again.clean)


def test_paths_of_other_prompts_are_not_taken_for_ours(tmp_path: Path) -> None:
    config = options()
    collector(config, tmp_path).collect(0)
    made = collector(config, tmp_path)
    made.slots = made.slots[::-1]  # as of an edited list
    drawn = made.collect(0)
    assert drawn.reward is not None
    torch.testing.assert_close(drawn.reward, tilt(drawn.clean, drawn.condition.prompts, []).float())


def test_what_any_process_lacks_all_of_them_make(tmp_path: Path) -> None:
    """So that their passes and questions to each other stay in step; what is there is kept."""
    made: list[str] = []

    def make() -> Draw:
        made.append("made")
        return draw_of(torch.zeros(2))

    for answer, count in ((True, 1), (False, 1), (True, 2)):
        shelf = Shelf(tmp_path, 0, lambda lacking, answer=answer: answer)
        kept = shelf.kept("base_00", "ours", Draw, make)
        assert len(made) == count and torch.equal(kept.reward, torch.zeros(2))


def draw_of(reward: Tensor) -> Draw:
    n = len(reward)
    x, u = torch.zeros(n, 3, 2), torch.zeros(n, 2, 2)
    empty = reward.new_zeros(n, 0)
    return Draw(x, u, u, torch.zeros(n).long(), reward, empty, torch.zeros(n, 2).double(), empty)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_told_before_it_is_kept(bad: float, tmp_path: Path) -> None:
    made = collector(options(), tmp_path)
    plain, count = made._rewards, []

    def one_bad(paths: Trajectories) -> tuple[Tensor, Tensor]:
        reward, gradient = plain(paths)
        count.append(1)
        return (reward.clone().index_fill_(0, torch.tensor([1]), bad), gradient)

    made._rewards = one_bad  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="the reward is not finite: check the reward function"):
        made.collect(0)
    assert count == [1] and not list((tmp_path / "pool").glob("*"))


# ------------------------------------------------------------------------------------- whole runs


def trained(config: Config) -> dict[str, Tensor]:
    made = trainer(config)
    made.fit()
    return {name: value.clone() for name, value in made.policy.state_dict().items()}


def test_a_run_goes_on_bit_for_bit_with_its_pool_and_own_paths(tmp_path: Path) -> None:
    own = {"pool__own_share": 0.5, "pool__refresh": 1}
    whole = trained(options(tmp_path / "whole", **own))
    trained(options(tmp_path / "parts", training__num_epochs=3, **own))
    again = trained(options(tmp_path / "parts", **own))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    "method", ["nabla-db", "nabla-db-lambda", "adjoint-matching", "terminal-gradient"]
)
def test_every_matching_method_learns_from_either_source(method: str, tmp_path: Path) -> None:
    more = {"experiment__method": method, "training__num_epochs": 1}
    paths = trained(options(tmp_path / "paths", **more))
    pool = trained(options(tmp_path / "pool", training__source="pool", **more))
    assert any(not torch.equal(paths[name], pool[name]) for name in paths)
    assert all(bool(value.isfinite().all()) for value in pool.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experiment.method": "ddpo", "training.source": "pool"}, "training.source=pool"),
        ({"training.source": "paths"}, "training.source=pool"),
        ({"pool.images_per_prompt": 5}, "pool.images_per_prompt=5"),
        ({"pool.own_share": 0.05}, "give 0.25 or more"),
        ({"pool.looks": 2, "experiment.method": "adjoint-matching"}, "set config.pool.looks=0"),
        (
            {
                "experiment.method": "adjoint-matching",
                "training.source": "pool",
                "model.unet_reg_scale": 1.0,
            },
            "model.unet_reg_scale=0",
        ),
        ({"sampling.scheduler": "ddim", "sampling.eta": 0.5}, "sampling.eta=1"),
    ],
)
def test_what_does_not_go_with_a_pool_is_one_line(changes: dict[str, object], words: str) -> None:
    config = options()
    for key, value in changes.items():
        set_option(config, key, value)
    with pytest.raises(ConfigError) as raised:
        check_settings(config)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_the_source_follows_the_method() -> None:
    config = Config()
    assert source_of(config) == "paths"
    config.experiment.method = "reward-weighted"
    assert source_of(config) == "pool" and find_method("reward-weighted").has_prior


def test_the_methods_are_built_as_they_are_called(tmp_path: Path) -> None:
    made = trainer(options(tmp_path, experiment__method="nabla-db-pool"))
    assert isinstance(made.objective, ReweightedRegression)
    assert made.objective.uses_reward_gradient and made.objective.carries_gradient
    other = trainer(options(tmp_path / "b"))
    assert not other.objective.uses_reward_gradient and not other.objective.carries_gradient
