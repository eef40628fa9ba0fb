"""The identities of residual ∇-DB (docs/method.md), in float64 on an exact world and a tiny SD."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nablagfn.config import Config
from nablagfn.core import kernels, rng
from nablagfn.core.kernels import KernelTable
from nablagfn.core.log_reward import LogReward
from nablagfn.core.lookahead import GRADIENT, GuessKind, How, attenuation, guess
from nablagfn.core.rollout import rollout
from nablagfn.core.types import Policy, Reward, Selection, Transitions
from nablagfn.core.value_gradient import Evaluated, mean_square
from nablagfn.methods.estimators.guess import Guess
from nablagfn.methods.estimators.residual_db import ResidualDB, reverse_score
from nablagfn.methods.objectives.matching import MatchingObjective, residual_score
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.prompts import PromptSet
from nablagfn.rewards import analytic
from nablagfn.runs.runfolder import RunFolder
from nablagfn.training.trainer import Trainer
from tests.tables import table_of
from tests.tiny_pipeline import make_pipeline
from tests.worlds import MixtureWorld, PlaneFlow, randomise, tilt

PROMPTS = ("a", "bbb", "cc", "dddd")
STEPS = 6
BETA = 2.5


@dataclass(frozen=True)
class Scene:
    """A policy, its sampler, and every transition of four trajectories drawn from it."""

    policy: Policy
    table: KernelTable
    chosen: Selection
    batch: Transitions
    reward: Reward

    @property
    def log_reward(self) -> LogReward:
        return LogReward(self.policy, self.reward, BETA)

    def guess(self, **options: float) -> MatchingObjective:
        estimator = Guess(self.policy, self.log_reward, "squared")
        return MatchingObjective(self.policy, self.table, estimator, **options)

    def residual_db(self, flow: torch.nn.Module, mode: str = "squared", **options: Any):
        estimator = ResidualDB(self.policy, self.log_reward, mode, flow, **options)
        strength = options.get("strength", 1.0)
        return MatchingObjective(self.policy, self.table, estimator, strength=strength)


def draw_scene(policy: Policy, reward: Reward, num_steps: int = STEPS) -> Scene:
    table = table_of(policy, num_steps)
    shape = (num_steps + 1, *policy.sample_shape)
    rows = range(len(PROMPTS))
    noise = rng.normal(shape, rows, seed=0, purpose="noise", dtype=torch.float64)
    drawn = rollout(policy, table, noise, policy.condition(PROMPTS, ()))
    row = torch.arange(len(PROMPTS)).repeat_interleave(num_steps)
    step = torch.arange(num_steps).repeat(len(PROMPTS))
    chosen = Selection(drawn, row, step)
    return Scene(policy, table, chosen, chosen.transitions(), reward)


@pytest.fixture
def scene(world: MixtureWorld) -> Scene:
    return draw_scene(world, tilt)


@pytest.fixture
def picture_scene(policy64: StableDiffusionPolicy) -> Scene:
    """Pictures of a random Stable Diffusion; few steps, since every row is a U-Net pass."""
    return draw_scene(policy64, analytic.colourfulness, num_steps=2)


@pytest.fixture
def flow(world: MixtureWorld) -> PlaneFlow:
    """A flow away from its start."""
    flow = world.make_flow((8, 8), 1, seed=5)
    randomise(list(flow.parameters()), 0.3, seed=7)
    return flow


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


# -------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("with_flow", [False, True])
def test_forward_loss_is_the_distance_to_the_value_gradient(
    scene: Scene, flow: PlaneFlow, with_flow: bool
) -> None:
    """‖(c2/σ²)(ε_θ − ε_#) − β·γ·∇r − g_φ‖², each part computed here by itself."""
    objective = scene.residual_db(flow) if with_flow else scene.guess()
    batch, here = scene.batch, objective.evaluate(scene.batch)
    k, policy = here.k, scene.policy
    value = guess(scene.log_reward, policy, batch.x_next, k, batch.condition, "squared").gradient
    if with_flow:
        value = value + flow(batch.x_next, k.next.time, batch.condition)
    known = (k.c2 / k.std**2 * (here.output - here.output_ref) - value).square().mean(1)
    opposite = (k.c2 / k.std**2 * (here.output - here.output_ref) + value).square().mean(1)
    found = objective.losses(batch).terms["forward"]
    close(found, known)
    assert (found - opposite).abs().min() > 1e-6


def log_ratio(here: Evaluated, x_next: Tensor, strength: float) -> Tensor:
    """Σ log p_θ − s·log p_# over the batch, by the densities."""
    ours = kernels.log_prob(here.x, x_next, here.output, here.k)
    return (ours - strength * kernels.log_prob(here.x, x_next, here.output_ref, here.k)).sum()


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.0])
def test_forward_residual_is_the_gradient_of_the_log_ratio(scene: Scene, strength: float) -> None:
    here = scene.guess().evaluate(scene.batch)
    x_next = scene.batch.x_next.clone().requires_grad_()
    (known,) = torch.autograd.grad(log_ratio(here, x_next, strength), x_next)
    found = residual_score(
        here.x, scene.batch.x_next, here.output, here.output_ref, here.k, strength
    )
    assert known.abs().max() > 1e-3
    close(found, known)


def test_x_next_cancels_at_full_strength_only(scene: Scene) -> None:
    here, x_next = scene.guess().evaluate(scene.batch), scene.batch.x_next
    for strength, cancels in ((1.0, True), (0.6, False)):
        one, other = (
            residual_score(here.x, x, here.output, here.output_ref, here.k, strength)
            for x in (x_next, x_next + 1)
        )
        assert torch.equal(one, other) is cancels


def test_the_short_formula_is_accurate_in_float32(scene: Scene) -> None:
    """A LoRA's first steps change ε by little; subtracting two scores would lose it."""
    here, x_next = scene.guess().evaluate(scene.batch), scene.batch.x_next
    eps = here.output_ref + 1e-5 * here.output
    exact = residual_score(here.x, x_next, eps, here.output_ref, here.k)
    delta = (eps - here.output_ref).float()
    k = scene.table.at(scene.batch.step, delta)
    short = residual_score(here.x.float(), x_next.float(), delta, torch.zeros_like(delta), k)
    torch.testing.assert_close(short.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["world", "pictures"])
def test_forward_residual_is_exactly_zero_at_the_start(kind: str) -> None:
    if kind == "world":
        scene = draw_scene(MixtureWorld(), tilt)
    else:
        policy = StableDiffusionPolicy(make_pipeline(), guidance_scale=3.0, lora_rank=2)
        scene = draw_scene(policy, analytic.brightness, num_steps=2)
    losses = scene.guess().losses(scene.batch)
    assert torch.equal(losses.metrics["residual_score_sq"], torch.zeros(len(scene.batch)).double())


# -------------------------------------------------------------------------------- reverse


@pytest.mark.parametrize("fixture", ["scene", "picture_scene"])
def test_reverse_score_is_the_gradient_of_log_prob(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    scene: Scene = request.getfixturevalue(fixture)
    batch, policy = scene.batch, scene.policy
    k, x = scene.table.at(batch.step, batch.x), batch.x.clone().requires_grad_()
    eps = policy.output(x, k.here.time, batch.condition)
    (known,) = torch.autograd.grad(
        kernels.log_prob(x, batch.x_next, eps, k).sum(), x, retain_graph=True
    )
    found = reverse_score(x, batch.x_next, eps, k)
    assert not found.requires_grad
    close(found, known)


def separate_reverse_target(
    scene: Scene, mode: str, strength: float, how: How = GRADIENT
) -> Tensor:
    """Two log-density gradients and the guess, each by its own backward pass."""
    batch, policy = scene.batch, scene.policy
    k = scene.table.at(batch.step, batch.x)
    x = batch.x.clone().requires_grad_()

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value.sum(), x)[0]

    def eps() -> Tensor:
        return policy.output(x, k.here.time, batch.condition)

    ours = gradient(kernels.log_prob(x, batch.x_next, eps(), k))
    with policy.reference():
        reference = gradient(kernels.log_prob(x, batch.x_next, eps(), k))
    clean = kernels.predict_clean(x, eps(), k.here)
    images = policy.decode(clean)
    value = scene.reward(images, batch.condition.prompts, batch.condition.metadata).sum()
    (reward,) = torch.autograd.grad(value, x if how.kind == "gradient" else clean)
    if how.kind == "shifted":  # a shift small enough to be a derivative of what is predicted of x_N
        step = 1e-6 / BETA
        there = x + step * BETA * reward
        moved = policy.output(there, k.here.time, batch.condition)
        ends = kernels.predict_end(there, moved, k.here), kernels.predict_end(x, eps(), k.here)
        reward = ((ends[0] - ends[1]) / (step * BETA)).detach()
    gamma = k.here.alpha_bar if mode == "squared" else k.here.alpha_bar**0.5
    return ours - strength * reference + BETA * gamma * reward


@pytest.mark.parametrize("mode", ["squared", "sqrt"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_one_backward_pass_gives_both_reverse_gradients(
    scene: Scene, flow: PlaneFlow, mode: str, strength: float
) -> None:
    objective = scene.residual_db(flow, mode, strength=strength)
    found = objective.estimator.reverse_target(objective.evaluate(scene.batch))
    assert not found.requires_grad
    close(found, separate_reverse_target(scene, mode, strength))


@pytest.mark.parametrize(("kind", "rtol"), [("no-jacobian", 1e-8), ("shifted", 1e-4)])
def test_the_reverse_condition_takes_the_guess_of_any_kind(
    scene: Scene, flow: PlaneFlow, kind: GuessKind, rtol: float
) -> None:
    """The same guess at both ends of a step, so that g_φ is fitted to what it misses."""
    how = How(kind, cap=1e-7)
    objective = scene.residual_db(flow, how=how)
    here = objective.evaluate(scene.batch)
    found = objective.estimator.reverse_target(here)
    known = separate_reverse_target(scene, "squared", 1.0, how)
    assert not found.requires_grad
    torch.testing.assert_close(found, known, rtol=rtol, atol=rtol * float(known.abs().max()))
    other = separate_reverse_target(scene, "squared", 1.0)
    assert float((found - other).abs().max()) > 1e-3
    ahead = guess(
        scene.log_reward,
        scene.policy,
        scene.batch.x_next,
        here.k,
        scene.batch.condition,
        "squared",
        how,
    )
    assert torch.equal(here.ahead.guess, ahead.gradient)


def test_one_backward_pass_gives_both_reverse_gradients_of_pictures(picture_scene: Scene) -> None:
    flow = picture_scene.policy.make_flow((8, 16), 1, seed=0).double()
    objective = picture_scene.residual_db(flow)
    found = objective.estimator.reverse_target(objective.evaluate(picture_scene.batch))
    close(found, separate_reverse_target(picture_scene, "squared", 1.0))


def test_reverse_loss_is_the_mean_square_of_the_reverse_condition(
    scene: Scene, flow: PlaneFlow
) -> None:
    batch, k = scene.batch, scene.table.at(scene.batch.step, scene.batch.x)
    terms = scene.residual_db(flow, reverse_scale=3.0).losses(batch).terms
    value = flow(batch.x, k.here.time, batch.condition)
    known = 3 * mean_square(separate_reverse_target(scene, "squared", 1.0) + value)
    close(terms["reverse"], known)


def test_reverse_and_terminal_losses_train_the_flow_only(scene: Scene, flow: PlaneFlow) -> None:
    terms = scene.residual_db(flow).losses(scene.batch).terms
    for name, reaches_theta in (("reverse", False), ("terminal", False), ("forward", True)):
        theta = torch.autograd.grad(
            terms[name].sum(), scene.policy.parameters(), retain_graph=True, allow_unused=True
        )
        phi = torch.autograd.grad(terms[name].sum(), list(flow.parameters()), retain_graph=True)
        assert all(g is not None and g.abs().max() > 0 for g in phi)
        assert [g is not None for g in theta] == [reaches_theta] * len(theta)


def test_terminal_loss_is_the_flow_at_the_clean_end(scene: Scene, flow: PlaneFlow) -> None:
    batch = scene.batch
    terms = scene.residual_db(flow).losses(batch).terms
    last = batch.step == STEPS - 1
    clean = torch.zeros(int(last.sum()), dtype=torch.long)
    known = mean_square(flow(batch.x_next[last], clean, batch.condition[last]))
    close(terms["terminal"][last], known)
    assert (terms["terminal"][~last] == 0).all() and (known > 0).all()


# -------------------------------------------------------------------------------- the flow's start


def test_plane_flow_starts_at_exactly_zero(world: MixtureWorld) -> None:
    flow = world.make_flow((8, 8), 1, seed=1)
    x = torch.randn(50, 2, dtype=torch.float64)
    assert torch.equal(flow(x, torch.arange(50), world.condition([""] * 50)), torch.zeros(50, 2))


def test_unet_flow_starts_at_exactly_zero(policy64: StableDiffusionPolicy) -> None:
    """And its last layer learns at once: weight and bias both have a gradient."""
    flow = policy64.make_flow((8, 16), 1, seed=1)
    x = 10 * torch.randn(3, *policy64.sample_shape)
    value = flow(x, torch.tensor([0, 500, 999]), policy64.condition(PROMPTS[:3]))
    assert torch.equal(value, torch.zeros_like(x))
    (value + 1).square().sum().backward()
    assert flow.net.conv_out.weight.grad.abs().max() > 0
    assert flow.net.conv_out.bias.grad.abs().max() > 0


def test_make_flow_depends_on_its_seed_only(policy64: StableDiffusionPolicy) -> None:
    weights = []
    for seed, noise in ((1, 0), (1, 9), (2, 0)):
        torch.manual_seed(noise)
        weights.append(policy64.make_flow((8, 16), 1, seed=seed).net.conv_in.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_zero_flow_without_reverse_loss_is_no_flow(scene: Scene, world: MixtureWorld) -> None:
    zero = world.make_flow((8, 8), 1, seed=1)
    with_flow = scene.residual_db(zero, reverse_scale=0.0).losses(scene.batch)
    without = scene.guess().losses(scene.batch)
    close(with_flow.terms["forward"], without.terms["forward"])
    close(with_flow.total(), without.total())


# -------------------------------------------------------------------------------- the guess


class NeverAsked(MixtureWorld):
    """A policy whose ε must not be needed."""

    def output(self, x, time, condition):
        raise AssertionError("the clean sample needs no prediction")


@pytest.mark.parametrize("mode", ["squared", "sqrt"])
def test_the_guess_at_the_clean_end_is_the_reward_gradient(mode: str) -> None:
    policy = NeverAsked()
    table = table_of(policy, STEPS)
    x_next = torch.randn(4, 2, dtype=torch.float64)
    where = policy.condition(PROMPTS)
    k = table.at(torch.full((4,), STEPS - 1), x_next)
    found = guess(LogReward(policy, tilt, BETA), policy, x_next, k, where, mode).gradient
    leaf = x_next.clone().requires_grad_()
    (known,) = torch.autograd.grad(BETA * tilt(leaf, PROMPTS, ()).sum(), leaf)
    torch.testing.assert_close(found, known, rtol=1e-14, atol=0)


@pytest.mark.parametrize("mode", ["squared", "sqrt"])
def test_the_guess_is_the_attenuated_gradient_at_the_predicted_clean_sample(
    scene: Scene, mode: str
) -> None:
    """Mixed rows: noisy ones through x̂, clean ones as they are; checked row by row."""
    batch, policy = scene.batch, scene.policy
    k = scene.table.at(batch.step, batch.x)
    found = guess(scene.log_reward, policy, batch.x_next, k, batch.condition, mode).gradient
    for row in range(len(batch)):
        one = torch.tensor([row])
        x = batch.x_next[one].clone().requires_grad_()
        level, gamma, clean = k.next.alpha_bar[one], torch.ones(1), x
        if batch.step[row] < STEPS - 1:
            eps = policy.output(x, k.next.time[one], batch.condition[one])
            clean = (x - (1 - level) ** 0.5 * eps) / level**0.5
            gamma = level if mode == "squared" else level**0.5
        reward = tilt(clean, batch.condition[one].prompts, ())
        close(found[one], BETA * gamma * torch.autograd.grad(reward.sum(), x)[0])


def test_attenuation() -> None:
    level = torch.tensor([0.04, 0.25, 1.0])
    assert torch.equal(attenuation(level, "squared"), level)
    torch.testing.assert_close(attenuation(level, "sqrt"), torch.tensor([0.2, 0.5, 1.0]))


def test_the_guess_is_detached(scene: Scene) -> None:
    k = scene.table.at(scene.batch.step, scene.batch.x)
    batch = scene.batch
    value = guess(
        scene.log_reward, scene.policy, batch.x_next, k, batch.condition, "squared"
    ).gradient
    assert not value.requires_grad
    assert all(parameter.grad is None for parameter in scene.policy.parameters())


def test_reward_scale_doubles_the_guess(scene: Scene) -> None:
    batch, k = scene.batch, scene.table.at(scene.batch.step, scene.batch.x)
    one, two = (
        guess(
            LogReward(scene.policy, tilt, scale),
            scene.policy,
            batch.x_next,
            k,
            batch.condition,
            "sqrt",
        ).gradient
        for scale in (1.0, 2.0)
    )
    close(two, 2 * one)
    assert one.abs().min() > 0


# -------------------------------------------------------------------------------- trust region


def test_trust_region_is_zero_for_the_parameters_that_drew(scene: Scene) -> None:
    trust = scene.guess(trust=10.0).losses(scene.batch).terms["trust"]
    gradients = torch.autograd.grad(trust.sum(), scene.policy.parameters())
    assert trust.abs().max() < 1e-24
    assert all(gradient.abs().max() < 1e-11 for gradient in gradients)


def test_trust_region_is_the_scaled_drift_of_eps(scene: Scene) -> None:
    randomise(scene.policy.parameters(), 0.1, seed=3)
    objective = scene.guess(trust=10.0)
    trust = objective.losses(scene.batch).terms["trust"]
    drift = objective.evaluate(scene.batch).output - scene.batch.output_old
    assert trust.min() > 0
    close(trust, 10 * drift.square().mean(1))


# -------------------------------------------------------------------------------- whose prompt


def test_permuting_the_batch_permutes_the_losses(scene: Scene, flow: PlaneFlow) -> None:
    objective = scene.residual_db(flow)
    order = torch.randperm(len(scene.batch), generator=torch.Generator().manual_seed(0))
    close(
        objective.losses(scene.batch[order]).total(), objective.losses(scene.batch).total()[order]
    )


def test_a_batch_of_one_is_its_row_of_the_batch(scene: Scene, flow: PlaneFlow) -> None:
    objective = scene.residual_db(flow)
    whole = objective.losses(scene.batch).total()
    for row in range(len(scene.batch)):
        one = torch.tensor([row])
        close(objective.losses(scene.batch[one]).total(), whole[one])


def test_the_reward_sees_the_batch_s_own_prompts(scene: Scene, flow: PlaneFlow) -> None:
    """Other prompts for the same transitions change the losses of exactly those rows."""
    objective, batch = scene.residual_db(flow), scene.batch
    prompts = list(batch.condition.prompts)
    prompts[3] = "a much longer prompt"
    other = replace(batch, condition=replace(batch.condition, prompts=tuple(prompts)))
    changed = objective.losses(other).total() != objective.losses(batch).total()
    assert changed.nonzero().flatten().tolist() == [3]


def test_metadata_stays_with_its_prompt(world: MixtureWorld) -> None:
    where = world.condition(PROMPTS, [{"n": i} for i in range(4)])
    picked = where[torch.tensor([2, 0, 2])]
    assert picked.prompts == ("cc", "a", "cc")
    assert [m["n"] for m in picked.metadata] == [2, 0, 2]
    masked = where[torch.tensor([False, True, False, True])]
    assert masked.prompts == ("bbb", "dddd")


# -------------------------------------------------------------------------------- memory


def picture_gradients(checkpointing: bool) -> list[Tensor]:
    """Losses, and gradients of θ and φ, of the whole objective on a tiny Stable Diffusion."""
    policy = StableDiffusionPolicy(
        make_pipeline().to(torch.float64),
        guidance_scale=3.0,
        lora_rank=2,
        gradient_checkpointing=checkpointing,
    )
    randomise(policy.parameters(), 0.1)
    scene = draw_scene(policy, analytic.colourfulness, num_steps=2)
    flow = policy.make_flow((8, 16), 1, seed=0).double()
    losses = scene.residual_db(flow, strength=0.5).losses(scene.batch)
    losses.total().sum().backward()
    parameters = [*policy.parameters(), *flow.parameters()]
    return [losses.total().detach(), *(p.grad for p in parameters if p.grad is not None)]


def test_gradient_checkpointing_changes_no_loss_and_no_gradient() -> None:
    """Recomputed layers must run with the LoRA on for θ and off for the frozen model."""
    plain, checkpointed = picture_gradients(False), picture_gradients(True)
    assert len(plain) == len(checkpointed) > 50
    for one, other in zip(plain, checkpointed, strict=True):
        close(other, one)


# -------------------------------------------------------------------------------- micro-batches


def make_trainer(folder: Path, micro_batch: int) -> Trainer:
    config = Config()
    config.training.micro_batch = micro_batch
    config.training.max_grad_norm = 1e30
    config.training.mixed_precision = "no"
    config.sampling.num_steps = STEPS
    config.logging.tensorboard = False
    world = MixtureWorld()
    randomise(world.parameters(), 0.1)
    return Trainer(
        world, tilt, PromptSet(PROMPTS), config, folder=RunFolder(folder), show_progress=False
    )


def test_micro_batches_give_the_same_gradients(scene: Scene, tmp_path: Path) -> None:
    """1, 3, 7 (not a divisor) and 4 (= training.batch_size) at a time, against all at once."""
    gradients = []
    for size in (len(scene.batch), 1, 3, 7, 0):
        trainer = make_trainer(tmp_path / str(size), size)
        trainer.updater.update(scene.chosen)
        parameters = [*trainer.policy.parameters(), *trainer.objective.modules.parameters()]
        gradients.append([p.grad for p in parameters])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-6)
    assert all(g.abs().max() > 1e-3 for g in gradients[0][:4])
