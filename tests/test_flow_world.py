"""A flow model, α = 1 − t and σ = t, in an exact world: the path of SD3 and FLUX without weights.

That it reaches its target is in tests/test_proofs.py, with the bounds of the ring it is made like.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nablagfn import worlds
from nablagfn.config import set_option
from nablagfn.core import kernels, lookahead, rng
from nablagfn.core.kernels import KernelTable, Step
from nablagfn.core.log_reward import LogReward
from nablagfn.core.lookahead import attenuation, guess
from nablagfn.core.rollout import rollout
from nablagfn.core.schedules import Levels, LinearNoising
from nablagfn.core.types import Trajectories
from nablagfn.families.world import view
from nablagfn.methods.objectives import matching
from nablagfn.prompts import PromptSet
from nablagfn.recipes.options import load_config
from nablagfn.rewards import NamedReward
from nablagfn.training.trainer import Trainer
from nablagfn.worlds import policy as world_policy
from nablagfn.worlds.policy import WorldPolicy, WorldReward
from nablagfn.worlds.world import World
from tests.tables import table_of
from tests.worlds import randomise

pytestmark = pytest.mark.usefixtures("no_report")

STEPS, ROWS, BETA = 12, 64, 2.0
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


@dataclass(frozen=True)
class Scene:
    """Paths of a policy that has moved away from its pretrained model, in float64."""

    world: World
    policy: WorldPolicy
    table: KernelTable
    paths: Trajectories

    def at(self, step: int) -> Step:
        return self.table.at_step(step, self.paths.x[:, step])

    def score(self, step: int) -> Tensor:
        """∇ log p of the pretrained marginal at x_k by autograd of its density, [ROWS, d]."""
        x = self.paths.x[:, step].clone().requires_grad_()
        level = self.table.schedule
        levels = Levels(level.alpha[step].expand(ROWS, 1), level.sigma[step].expand(ROWS, 1))
        (found,) = torch.autograd.grad(self.world.mixture.log_density(x, levels).sum(), x)
        return found


def scene_of(world: World) -> Scene:
    policy = WorldPolicy(world).to("cpu", torch.float64)
    randomise(policy.parameters(), 0.2)
    table = table_of(policy, STEPS)
    noise = rng.normal((STEPS + 1, 2), range(ROWS), seed=0, purpose="t", dtype=torch.float64)
    where = policy.condition(list(world.prompts) * ROWS)
    return Scene(world, policy, table, rollout(policy, table, noise, where))


@pytest.fixture(scope="module")
def scene() -> Scene:
    return scene_of(worlds.load("ring-flow"))


def test_it_starts_at_pure_noise_and_ends_where_the_other_worlds_do(scene: Scene) -> None:
    schedule = scene.table.schedule
    assert schedule.alpha[0] == 0 and schedule.sigma[0] == 1 and scene.table.start_std == 1
    assert float(torch.atan2(schedule.sigma[-1], schedule.alpha[-1])) == pytest.approx(0.029)
    assert scene.paths.x.isfinite().all() and scene.paths.output.isfinite().all()


# ---------------------------------------------------------------------- what must hold, and mutants


def the_velocity_is_that_of_the_density(scene: Scene) -> None:
    """x̂ from u is Tweedie's (x + σ²·∇ log p)/α."""
    for step in range(1, STEPS):
        k, x = scene.at(step), scene.paths.x[:, step]
        with scene.policy.reference():
            u = scene.policy.output(x, k.here.time, scene.paths.condition)
        tweedie = (x + k.here.sigma**2 * scene.score(step)) / k.here.alpha
        close(kernels.predict_clean(x, u, k.here), tweedie)


def the_residual_score_is_a_difference_of_scores(scene: Scene) -> None:
    """∇ of log p_θ − log p_# by autograd, at every step."""
    for step in range(STEPS):
        k, x = scene.at(step), scene.paths.x[:, step]
        u = scene.paths.output[:, step]
        with scene.policy.reference():
            u_ref = scene.policy.output(x, k.here.time, scene.paths.condition)
        x_next = scene.paths.x[:, step + 1].clone().requires_grad_()
        ratio = kernels.log_prob(x, x_next, u, k) - kernels.log_prob(x, x_next, u_ref, k)
        (known,) = torch.autograd.grad(ratio.sum(), x_next)
        close(matching.residual_score(x, x_next.detach(), u, u_ref, k), known)


def the_guess_is_attenuated_at_its_own_end(scene: Scene) -> None:
    """β·γ(x_{k+1})·∇r(x̂(x_{k+1})), by hand."""
    log_reward = LogReward(scene.policy, WorldReward(scene.world), BETA)
    for step in range(STEPS):
        k, x_next = scene.at(step), scene.paths.x[:, step + 1]
        where = scene.paths.condition
        found = guess(log_reward, scene.policy, x_next, k, where, "squared").gradient
        alpha, sigma = scene.table.schedule.alpha[step + 1], scene.table.schedule.sigma[step + 1]
        x, gamma = x_next.clone().requires_grad_(), torch.ones(())
        x_clean = x
        if step + 1 < STEPS:
            gamma = alpha**2 / (alpha**2 + sigma**2)
            u = scene.policy.output(x, k.next.time, where)
            x_clean = x - k.next.time[:, None] * u  # t is σ, and α + σ = 1
        (slope,) = torch.autograd.grad(x_clean[:, 0].sum(), x)  # r = x₁
        close(found, BETA * gamma * slope)


def close(found: Tensor, known: Tensor) -> None:
    torch.testing.assert_close(found, known, rtol=1e-7, atol=1e-7 * float(known.abs().max()))


CHECKS = (
    the_velocity_is_that_of_the_density,
    the_residual_score_is_a_difference_of_scores,
    the_guess_is_attenuated_at_its_own_end,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_holds(check: Callable[[Scene], None], scene: Scene) -> None:
    check(scene)


def std_for_variance(patch: pytest.MonkeyPatch) -> None:
    """σ for σ²."""

    def mutant(x, x_next, output, output_ref, k, strength=1.0):
        return k.c2 / k.std * (output - output_ref)

    patch.setattr(matching, "residual_score", mutant)


def other_sign(patch: pytest.MonkeyPatch) -> None:
    """The sign of u."""
    right = world_policy.output_of
    patch.setattr(world_policy, "output_of", lambda *given: -right(*given))


def other_end(patch: pytest.MonkeyPatch) -> None:
    """γ of x_k instead of x_{k+1}."""
    here: list[Step] = []
    right = lookahead.predicted_clean

    def remembering(policy, x, k, where):
        here[:] = [k]
        return right(policy, x, k, where)

    patch.setattr(lookahead, "predicted_clean", remembering)
    patch.setattr(
        lookahead, "attenuation", lambda level, mode: attenuation(here[0].here.alpha_bar, mode)
    )


@pytest.mark.parametrize("mutate", [std_for_variance, other_sign, other_end])
def test_mutants_are_caught(
    mutate: Callable[[pytest.MonkeyPatch], None],
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutate(monkeypatch)
    survived = []
    for check in CHECKS:
        with suppress(AssertionError):
            check(scene)
            survived.append(check)
    assert len(survived) < len(CHECKS)


# ------------------------------------------------------ the same world, other outputs


def rewritten(prediction: str) -> World:
    """The world from a little below t = 1, where ε says something of the clean sample, too."""
    world = worlds.load("ring-flow")
    noising = LinearNoising(cleanest=world.noising.cleanest, noisiest=0.98)
    return replace(world, noising=noising, prediction=prediction)  # type: ignore[arg-type]


def trained(prediction: str, out: Path) -> tuple[dict[str, Tensor], list[float]]:
    """The adapter after five updates in float64 weights, and what was measured on the way."""
    config = load_config("worlds/ring-flow")
    for key, value in {
        "pretrained.model": "rewritten",
        "sampling.num_steps": STEPS,
        "training.num_epochs": 5,
        "logging.sample_freq": 0,
        "evaluation.num_prompts": 0,
        "saving.output_dir": str(out / prediction),
    }.items():
        set_option(config, key, value)
    world = rewritten(prediction)
    policy = WorldPolicy(world).to("cpu", torch.float64)
    reward = NamedReward(world.name, WorldReward(world))
    shown = view(load_config("worlds/ring-flow"), table_of(policy, STEPS))
    trainer = Trainer(
        policy, reward, PromptSet(world.prompts), config, view=shown, show_progress=False
    )
    trainer.fit()
    rows = trainer.folder.metrics()
    return policy.state_dict(), [row[key] for row in rows for key in ("loss", "reward")]


def test_the_same_world_in_eps_and_in_v_trains_to_the_same(tmp_path: Path) -> None:
    """Up to float32 rounding of the samples and the coefficients, which training amplifies.

    Adam's first steps have the size of the learning rate, 2e-3, whatever the gradient: an entry
    whose gradient is rounding moves by chance. So the bound is on the weights' mean difference.
    """
    known, said = trained("flow", tmp_path)
    moved = WorldPolicy(rewritten("flow")).state_dict()
    for prediction in ("epsilon", "v_prediction", "sample"):
        weights, figures = trained(prediction, tmp_path)
        assert figures == pytest.approx(said, rel=1e-3), prediction
        for name, value in known.items():
            change = float((value - moved[name].double()).abs().mean())
            difference = float((weights[name] - value).abs().mean())
            assert difference < 0.02 * change, (prediction, name)
