"""A float16 U-Net on a CPU: what passes it backwards does not depend on how large it is."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from nablagfn.core import rng
from nablagfn.core.bellman import Pass
from nablagfn.core.kernels import KernelTable
from nablagfn.core.log_reward import LogReward, terminal_gradient
from nablagfn.core.rollout import replay, rollout
from nablagfn.core.types import Condition, Selection, Trajectories, Transitions
from nablagfn.core.value_gradient import mean_square
from nablagfn.methods.estimators.residual_db import ResidualDB
from nablagfn.methods.objectives.matching import MatchingObjective, residual_score
from nablagfn.models import in_range
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.prompts import PromptSet
from nablagfn.rewards import analytic
from nablagfn.training.trainer import Trainer
from nablagfn.training.updater import Updater
from tests.tables import table_of
from tests.test_rivals import KINDS, method_config
from tests.tiny_pipeline import make_pipeline
from tests.worlds import randomise

pytestmark = pytest.mark.usefixtures("no_report")

PROMPTS = ("a cat", "a dog")
STEPS = 3
BOUND = 0.02  # relative, of docs/performance.md
POWERS = (-40, 40)  # of two: exact in float32, far outside of float16


def make_policy(dtype: torch.dtype = torch.float16, **options: object) -> StableDiffusionPolicy:
    """VAE in float32, as `from_pretrained` has it; the same LoRA whatever the dtype."""
    pipeline = make_pipeline().to(dtype)
    pipeline.vae.to(torch.float32)
    policy = StableDiffusionPolicy(pipeline, **{"guidance_scale": 3.0, "lora_rank": 2, **options})
    randomise(policy.parameters(), 0.1)
    return policy


@functools.cache
def drawn() -> tuple[KernelTable, Trajectories]:
    """Two paths by the model in float32."""
    policy = make_policy(torch.float32)
    table = table_of(policy, STEPS)
    noise = rng.normal((STEPS + 1, *policy.sample_shape), range(2), seed=0, purpose="noise")
    return table, rollout(policy, table, noise, policy.condition(PROMPTS))


def transitions(policy: StableDiffusionPolicy) -> tuple[Selection, Transitions]:
    """Every transition of the two paths, with the policy's own embeddings."""
    paths = replace(drawn()[1], condition=policy.condition(PROMPTS))
    row = torch.arange(2).repeat_interleave(STEPS)
    chosen = Selection(paths, row, torch.arange(STEPS).repeat(2))
    return chosen, chosen.transitions()


def some(policy: StableDiffusionPolicy) -> tuple[Tensor, Tensor, Condition]:
    """x_0 of the two paths, which wants a gradient, with the time and the prompts."""
    table, paths = drawn()
    x = paths.x[:, 0].clone().requires_grad_()
    return x, table.at_step(0, x).here.time, policy.condition(PROMPTS)


def flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values])


def gradients(dtype: torch.dtype, beta: float) -> dict[str, Tensor]:
    """Whatever passes the U-Net: to x at every step, and to θ in a graph that served x, too."""
    policy = make_policy(dtype)
    chosen, batch = transitions(policy)
    log_reward = LogReward(policy, analytic.colourfulness, beta)
    estimator = ResidualDB(policy, log_reward, "squared", torch.nn.Identity())
    here = MatchingObjective(policy, drawn()[0], estimator).evaluate(batch)
    v = terminal_gradient(log_reward, chosen.paths.clean, chosen.paths.condition)
    frozen = Pass.at(policy, here.x, here.k, batch.condition, frozen=True)
    target = estimator.reverse_target(here) + here.ahead.score_ref  # before they cancel
    score = residual_score(here.x, batch.x_next, here.output, here.output_ref.detach(), here.k)
    loss = mean_square(score.detach() + score - here.ahead.guess).mean()
    return {
        "guess": here.ahead.guess,
        "reverse score": here.ahead.score_ref,
        "reverse target": target,
        "adjoint through ε": frozen.product([frozen.output], [here.k.c2 * v[chosen.row]]),
        "LoRA": flat(torch.autograd.grad(loss, policy.parameters())),
    }


@functools.cache
def true_gradients() -> dict[float, dict[str, Tensor]]:
    return {beta: gradients(torch.float32, beta) for beta in (1e-3, 1e2, 1e6)}


def far(beta: float) -> dict[str, float]:
    """What differs from float32 by more than the bound: infinite where an entry is not finite, or
    where more than 0.5 % are zero that are not zero in float32.
    """
    found = {}
    for name, value in gradients(torch.float16, beta).items():
        true = true_gradients()[beta][name]
        zeros = float(((value == 0) & (true != 0)).float().mean())
        sound = bool(value.isfinite().all()) and zeros <= 0.005
        found[name] = float((value - true).norm() / true.norm()) if sound else math.inf
    return {name: distance for name, distance in found.items() if distance > BOUND}


@pytest.fixture
def unscaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The border lets everything through as it is."""
    monkeypatch.setattr(in_range, "power_of_two", torch.ones_like)


# ---------------------------------------------------------------------------- against float32


@pytest.mark.parametrize("beta", [1e-3, 1e2, 1e6])
def test_gradients_are_those_of_float32_whatever_the_reward_scale(beta: float) -> None:
    assert far(beta) == {}


@pytest.mark.usefixtures("unscaled")
def test_without_the_border_there_are_silent_zeros() -> None:
    assert far(1e-3)["adjoint through ε"] == math.inf


# ---------------------------------------------------------------------------- by construction


@pytest.mark.parametrize("power", POWERS)
def test_a_product_is_exactly_linear_in_each_row_of_its_cotangent(power: int) -> None:
    """Rows far apart in scale: bit for bit the products of each at its own."""
    policy = make_policy()
    x, timestep, where = some(policy)
    eps = policy.output(x, timestep, where)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    apart = torch.tensor([1.0, 2.0**power]).reshape(2, 1, 1, 1)
    (one,) = torch.autograd.grad(eps, x, v, retain_graph=True)
    (other,) = torch.autograd.grad(eps, x, apart * v)
    assert one.abs().min() > 0 and torch.equal(other, apart * one)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("through_x", [True, False])
def test_the_gradient_of_theta_is_exactly_linear_in_the_loss(power: int, through_x: bool) -> None:
    """Also through a rollout, whose later steps pass their gradients on to earlier ones."""
    policy = make_policy()
    found = []
    for scale in (1.0, 2.0**power):
        if through_x:
            table, paths = drawn()
            noise = torch.ones(2, STEPS, *policy.sample_shape)
            start = torch.zeros(2, dtype=torch.long)
            where = policy.condition(PROMPTS)
            value = replay(policy, table, paths.x[:, 0], start, noise, where)
        else:
            x, timestep, where = some(policy)
            value = policy.output(x.detach(), timestep, where)
        for parameter in policy.parameters():
            parameter.grad = None
        (scale * value.square().mean()).backward(inputs=policy.parameters())
        found.append(flat([p.grad for p in policy.parameters()]) / scale)
    assert found[0].norm() > 0 and torch.equal(*found)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("to", ["x", "theta"])
@pytest.mark.usefixtures("unscaled")
def test_without_the_border_neither_is(to: str, power: int) -> None:
    policy = make_policy()
    x, timestep, where = some(policy)
    value = 2.0**power * policy.output(x, timestep, where)
    found = flat(torch.autograd.grad(value.sum(), x if to == "x" else policy.parameters()))
    assert not found.isfinite().all() if power > 0 else bool((found == 0).all())


def test_every_way_to_ask_for_gradients_agrees() -> None:
    """One by one, together, with `backward`, in several passes through one graph."""
    policy = make_policy()
    theta = policy.parameters()
    x, timestep, where = some(policy)
    eps = policy.output(x, timestep, where)
    value = 1e-9 * eps.square().sum()
    (to_eps,) = torch.autograd.grad(value, eps, retain_graph=True)
    assert torch.equal(to_eps, 1e-9 * 2 * eps)  # what lies outside of the border is not scaled
    (to_x,) = torch.autograd.grad(value, x, retain_graph=True)
    to_theta = torch.autograd.grad(value, theta, retain_graph=True)
    together = torch.autograd.grad(value, [x, *theta], retain_graph=True)
    (one,) = torch.autograd.grad(value, theta[3], retain_graph=True)
    value.backward()
    torch.testing.assert_close(x.grad, to_x, rtol=1e-2, atol=1e-2 * float(to_x.abs().max()))
    assert torch.equal(together[0], x.grad) and torch.equal(one, to_theta[3])
    for parameter, a, b in zip(theta, to_theta, together[1:], strict=True):
        assert torch.equal(a, b) and torch.equal(a, parameter.grad)
    (direct,) = torch.autograd.grad(theta[0].square().sum(), theta[0])  # it crosses no border
    assert torch.equal(direct, 2 * theta[0])


def test_checkpointing_changes_nothing() -> None:
    found = []
    for checkpointing in (False, True):
        policy = make_policy(gradient_checkpointing=checkpointing)
        x, timestep, where = some(policy)
        value = 1e9 * policy.output(x, timestep, where).square().sum()
        (to_x,) = torch.autograd.grad(value, x, retain_graph=True)
        found.append([to_x, *torch.autograd.grad(value, policy.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_only_float16_has_a_border() -> None:
    borders = {dtype: make_policy(dtype)._border for dtype in (torch.float32, torch.bfloat16)}
    assert set(borders.values()) == {None}


def test_scales_are_powers_of_two_and_a_broken_row_stays_alone() -> None:
    largest = torch.tensor([0.0, 1e-38, 3e-7, 1.0, 7.9, 6e4, 3e38])
    s = in_range.power_of_two(largest)
    assert torch.equal(s.log2(), s.log2().round()) and s[0] == 1
    inside = largest[2:] * s[2:]
    assert inside.min() >= in_range.TARGET and inside.max() < 2 * in_range.TARGET
    policy = make_policy()
    x, timestep, where = some(policy)
    v = torch.ones_like(x)
    v[0, 0, 0, 0] = math.inf
    (product,) = torch.autograd.grad(policy.output(x, timestep, where), x, v)
    assert not product[0].isfinite().any() and product[1].isfinite().all()


# ---------------------------------------------------------------------------- whole updates


@pytest.mark.parametrize("method", ["nabla-db", "adjoint-matching", "draft-k"])
def test_the_first_update_of_a_run_is_that_of_float32(method: str, tmp_path: Path) -> None:
    """Under a loss scale as on a GPU, and none is lost to finding it."""
    steps = []
    for dtype in (torch.float32, torch.float16):
        options = {"model.reward_scale": 1e3, "training.num_epochs": 1}
        config = method_config(method, tmp_path / str(dtype), **options)
        policy = make_policy(dtype, guidance_scale=1.0)
        prompts = PromptSet(("a cat", "a duck", "ants"))
        trainer = Trainer(policy, KINDS[1].reward, prompts, config, show_progress=False)
        trainer.updater.scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        before = flat(policy.parameters()).detach().clone()
        trainer.fit()
        steps.append(flat(policy.parameters()).detach() - before)
    true, found = steps
    assert float((found - true).norm() / true.norm()) < BOUND


def test_a_step_that_is_skipped_is_seen_and_the_next_one_is_made(tmp_path: Path) -> None:
    """GradScaler, on a CPU: its scale of 2^120 overflows float32 with a loss above 2^8."""
    config = method_config("refl", tmp_path, **{"training.max_grad_norm": 1.0})
    policy = make_policy(guidance_scale=1.0)
    trainer = KINDS[1].trainer(config)
    objective = trainer.objective
    objective.policy = policy
    objective.log_reward = LogReward(policy, analytic.colourfulness, 1e4)
    updater = Updater(Accelerator(cpu=True), policy, objective, config)
    updater.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    chosen, _ = transitions(policy)
    before = flat(policy.parameters()).detach().clone()
    lost = updater.update(chosen).metrics
    assert not math.isfinite(lost["grad_norm"]) and updater.scaler.get_scale() == 2.0**119
    assert torch.equal(flat(policy.parameters()), before)
    updater.scaler.load_state_dict({**updater.scaler.state_dict(), "scale": 2.0**16})
    made = updater.update(chosen).metrics
    assert 0 < made["grad_norm"] < math.inf and not torch.equal(flat(policy.parameters()), before)
