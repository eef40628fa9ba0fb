"""VGG-Flow: every loss term against automatic differentiation, and mutants; where it is exact; and
what becomes of a run whose paths have no noise.

Letters as in `methods.objectives.vgg_flow`: V̂ the value gradient, h the difference.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nablagfn import worlds
from nablagfn.cli import main
from nablagfn.commands.evaluate import EvaluationRequest, evaluate_run
from nablagfn.config import ConfigError, set_option
from nablagfn.core import rng
from nablagfn.core.kernels import KernelTable, kernel_table
from nablagfn.core.log_reward import LogReward
from nablagfn.core.path_kl import path_ratio
from nablagfn.core.rollout import rollout
from nablagfn.core.schedules import LinearNoising, Schedule, schedule_of
from nablagfn.core.transport import transport_cost
from nablagfn.core.types import Condition, Losses, Selection, Trajectories, Transitions
from nablagfn.methods.build import build_kernel
from nablagfn.methods.objectives import vgg_flow
from nablagfn.methods.objectives.vgg_flow import VggFlow
from nablagfn.methods.registry import check_settings, target_of
from nablagfn.recipes.options import load_config
from nablagfn.report import build as build_report
from nablagfn.runs.runfolder import RunFolder
from nablagfn.worlds.mixture import Mixture, Quadratic
from nablagfn.worlds.policy import PlaneFlow, WorldPolicy, WorldReward
from nablagfn.worlds.world import FLOW, World, vector
from tests.tables import table_of
from tests.test_rivals import KINDS, method_config
from tests.worlds import randomise

pytestmark = pytest.mark.usefixtures("no_report")

STEPS, ROWS, BETA = 6, 16, 2.0
WEIGHT, TRUST = 30.0, 3.0
TINY = 1e-6  # h of what is compared with derivatives


@dataclass(frozen=True)
class Scene:
    """A policy and a g_φ off their starts, in float64, and the policy's paths."""

    world: World
    policy: WorldPolicy
    flow: nn.Module
    table: KernelTable
    paths: Trajectories
    objective: VggFlow

    def batch(self, step: int) -> Transitions:
        rows = torch.arange(ROWS)
        found = Selection(self.paths, rows, torch.full((ROWS,), step)).transitions()
        return replace(found, output_old=found.output_old + 0.1)  # as if θ had moved since

    def losses(self, step: int) -> Losses:
        return self.objective.losses(self.batch(step))

    def of(self, step: int, *, frozen: bool = False) -> Tensor:
        return self.output(self.paths.x[:, step], self.time(step), frozen=frozen)

    def time(self, step: int) -> Tensor:
        return self.table.time[step].expand(ROWS)

    def output(self, x: Tensor, time: Tensor, *, frozen: bool = False) -> Tensor:
        with self.policy.reference() if frozen else contextlib.nullcontext():
            return self.policy.output(x, time, self.paths.condition)

    def guess(self, x: Tensor, time: Tensor) -> Tensor:
        """β·γ·∇r(E[x_N|x]) with the reward's gradient in closed form, differentiable in x and t.

        x_N = α_N·x_clean + t_N·noise, and E[x_N|x] from the Gaussian algebra of the two levels.
        """
        t, end = time[:, None], float(self.table.time[-1])
        x_clean = x - t * self.output(x, time)
        noise = (x - (1 - t) * x_clean) / t  # E of x's noise
        shared = (1 - t) / (1 - end) * end / t  # its correlation with x_N's
        x_end = (1 - end) * x_clean + end * shared * noise
        slope = self.world.reward.gradient(x_end, torch.zeros(len(x), dtype=torch.long))
        return BETA * ((1 - t) / (1 - end)) ** 2 * slope

    def value(self, x: Tensor, time: Tensor) -> Tensor:
        return self.guess(x, time) + self.flow(x, time, self.paths.condition)


@pytest.fixture(scope="module")
def scene() -> Scene:
    world = replace(worlds.load("ring-saturating"), noising=FLOW, prediction="flow")
    policy = WorldPolicy(world).to("cpu", torch.float64)
    randomise(policy.parameters(), 0.1)
    flow = policy.make_flow((), 1, 0).double()
    randomise(list(flow.parameters()), 0.1, seed=1)
    table = table_of(policy, STEPS, eta=0.0)
    noise = rng.normal((STEPS + 1, 2), range(ROWS), seed=0, purpose="t", dtype=torch.float64)
    paths = rollout(policy, table, noise, policy.condition(list(world.prompts) * ROWS))
    objective = VggFlow(
        policy,
        LogReward(policy, WorldReward(world), BETA),
        table,
        flow,
        boundary=WEIGHT,
        difference=TINY,
        trust=TRUST,
    )
    return Scene(world, policy, flow, table, paths, objective)


# ---------------------------------------------------------------------- what must hold, and mutants


def the_paths_are_eulers(scene: Scene) -> None:
    for step in range(STEPS):
        length = float(scene.table.time[step] - scene.table.time[step + 1])
        x, x_next = scene.paths.x[:, step], scene.paths.x[:, step + 1]
        close(x_next, x - length * scene.paths.output[:, step])


def the_matching_loss_is_that_of_the_paper(scene: Scene) -> None:
    """Its value, and its gradient in θ by hand: 2(u_θ − u_# + V̂)·∂u_θ, V̂ a constant."""
    for step in range(STEPS):
        value = scene.value(scene.paths.x[:, step], scene.time(step)).detach()
        off = scene.of(step) - scene.of(step, frozen=True) + value
        found = scene.losses(step).terms["forward"]
        close(found, off.square().mean(1))
        weighed = (2 * off.detach() / 2 * scene.of(step)).sum()
        theta, phi = scene.policy.parameters(), list(scene.flow.parameters())
        both = torch.autograd.grad(found.sum(), [*theta, *phi], allow_unused=True)
        assert both[len(theta) :] == (None,) * len(phi)
        for one, two in zip(both, torch.autograd.grad(weighed, theta), strict=False):
            close(one, two)


def the_trust_region_is_measured_in_noise(scene: Scene) -> None:
    """∂ε/∂u = α of a flow model: ε = x + (1 − t)·u."""
    for step in range(STEPS):
        alpha = 1 - scene.time(step)[:, None]
        drift = alpha * (scene.of(step) - scene.batch(step).output_old)
        close(scene.losses(step).terms["trust"], TRUST * drift.square().mean(1))


def the_consistency_loss_is_that_of_derivatives(scene: Scene) -> None:
    """∂_t V̂ + [∇V̂]ᵀ(u_# − V̂) + [∇u_#]ᵀV̂, the first two along (x, t), the last transposed; and
    its gradient in φ, which passes V̂ in all three but not the direction V̂ − u_#."""
    phi = list(scene.flow.parameters())
    for step in range(STEPS):
        x, time = scene.paths.x[:, step], scene.time(step)
        direction = (scene.value(x, time) - scene.of(step, frozen=True)).detach()
        tangent = (direction, -torch.ones_like(time))
        along = torch.autograd.functional.jvp(scene.value, (x, time), tangent, create_graph=True)[1]
        leaf = x.clone().requires_grad_()
        (carried,) = torch.autograd.grad(
            scene.output(leaf, time, frozen=True),
            leaf,
            scene.value(x, time),
            create_graph=True,
        )
        known = (along - carried).square().mean(1)
        found = scene.losses(step).terms["consistency"]
        near(found, known)
        theirs = torch.autograd.grad(known.sum(), phi, allow_unused=True)
        theta = scene.policy.parameters()
        ours = torch.autograd.grad(found.sum(), [*phi, *theta], allow_unused=True)
        assert ours[len(phi) :] == (None,) * len(theta)
        for one, two in zip(ours, theirs, strict=False):
            near(one, two)


def the_boundary_loss_is_at_the_end_alone(scene: Scene) -> None:
    for step in range(STEPS):
        x_end, time = scene.paths.clean, scene.time(STEPS)
        missing = scene.value(x_end, time) - BETA * scene.world.reward.gradient(
            x_end, torch.zeros(ROWS, dtype=torch.long)
        )
        known = WEIGHT * missing.square().mean(1) * float(step + 1 == STEPS)
        close(scene.losses(step).terms["boundary"], known)


def close(found: Tensor, known: Tensor) -> None:
    most = float(known.detach().abs().max())
    torch.testing.assert_close(found, known, rtol=1e-7, atol=1e-9 * most)


def near(found: Tensor, known: Tensor) -> None:
    """Up to the finite differences' error."""
    most = float(known.detach().abs().max())
    torch.testing.assert_close(found, known, rtol=1e-3, atol=1e-4 * most)


CHECKS = (
    the_paths_are_eulers,
    the_matching_loss_is_that_of_the_paper,
    the_trust_region_is_measured_in_noise,
    the_consistency_loss_is_that_of_derivatives,
    the_boundary_loss_is_at_the_end_alone,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_holds(check: Callable[[Scene], None], scene: Scene) -> None:
    check(scene)


def other_sign(patch: pytest.MonkeyPatch) -> None:
    """v_paper for u."""
    patch.setattr(vgg_flow, "mismatch", lambda u, u_ref, value: u - u_ref - value.detach())


def with_graph(patch: pytest.MonkeyPatch) -> None:
    """The matching loss trains φ, too."""
    patch.setattr(vgg_flow, "mismatch", lambda u, u_ref, value: u - u_ref + value)


def other_way(patch: pytest.MonkeyPatch) -> None:
    """Time runs towards the noise."""
    right = vgg_flow.ahead_of

    def mutant(x, value, output_ref, k, h):
        later = right(x, value, output_ref, k, h)
        return replace(later, time=2 * k.here.time - later.time)

    patch.setattr(vgg_flow, "ahead_of", mutant)


def uncontrolled(patch: pytest.MonkeyPatch) -> None:
    """Along the pretrained velocity, without −βg: a linear equation instead of Bellman's."""
    right = vgg_flow.ahead_of
    patch.setattr(
        vgg_flow,
        "ahead_of",
        lambda x, value, ref, k, h: right(x, torch.zeros_like(value), ref, k, h),
    )


def not_carried(patch: pytest.MonkeyPatch) -> None:
    """Without [∇u_#]ᵀV̂."""
    patch.setattr(vgg_flow, "inconsistency", lambda here, there, carried, h: (there - here) / h)


def carried_back(patch: pytest.MonkeyPatch) -> None:
    """[∇u_#]ᵀV̂ with the sign of the paper's v."""
    patch.setattr(
        vgg_flow, "inconsistency", lambda here, there, carried, h: (there - here) / h + carried
    )


def root_of_gamma(patch: pytest.MonkeyPatch) -> None:
    right = vgg_flow.attenuation
    patch.setattr(vgg_flow, "attenuation", lambda level, mode: right(level, "sqrt"))


def with_jacobian(patch: pytest.MonkeyPatch) -> None:
    """∇r carried back through the network, as nabla-db's guess is."""

    def mutant(self, x, output, t, where):
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            u = self.policy.output(leaf, t.flatten(), where)
            end = self._end_alpha
            kept = (1 - t) / end * self._end_sigma**2 / t.square()
            x_clean = leaf - t * u
            value = self.log_reward(end * x_clean + kept * (leaf - (1 - t) * x_clean), where)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return ((1 - t) / end) ** 2 * slope

    patch.setattr(VggFlow, "_guess", mutant)


@pytest.mark.parametrize(
    "mutate",
    [
        other_sign,
        with_graph,
        other_way,
        uncontrolled,
        not_carried,
        carried_back,
        root_of_gamma,
        with_jacobian,
    ],
)
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


# ---------------------------------------------------------------------- where the answer is known


MEAN, VARIANCE = vector(0.5, -0.3), vector(0.5, 0.2)
SLOPE, CURVATURE = vector(1.0, -2.0), vector(1.5, 0.7)
GAUSSIAN = World(
    title="Gaussian in the plane, quadratic reward, flow",
    mixture=Mixture(MEAN[None], vector(1.0), VARIANCE),
    reward=Quadratic(SLOPE[None], CURVATURE.diag()[None]),
    beta=BETA,
    prompts=("bowl",),
    noising=FLOW,
    prediction="flow",
)


@dataclass(frozen=True)
class Optimum:
    """VGG-Flow's optimum for N(m, diag(v)) and r = bᵀx − ½xᵀAx with a diagonal A; each axis alone.

    With s² = (1 − t)²v + t² and y = (x − (1 − t)m)/s the pretrained ODE is dy/dt = 0, and
    V̂ = p(t)·(y + κ)/s solves ∂_t V̂ + [∇V̂]ᵀ(u_# − V̂) + [∇u_#]ᵀV̂ = 0 if dp/dt = p²/s², so

        1/p(t) = 1/p_N − ∫_{t_N}^t dτ/s²,   p_N = −βA·s_N²,   κ = (A·m_N − b)/(A·s_N)

    and along the controlled path (y + κ)·p stays: x_N is Gaussian, too.
    """

    end: float
    beta: float = BETA

    def spread(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * VARIANCE + t**2).sqrt()

    def _whole(self, t: Tensor) -> Tensor:
        root = VARIANCE.sqrt()
        return (((1 + VARIANCE) * t - VARIANCE) / root).atan() / root

    @property
    def at_end(self) -> Tensor:
        return torch.tensor(self.end, dtype=torch.float64)

    @property
    def kappa(self) -> Tensor:
        mean = (1 - self.end) * MEAN
        return (CURVATURE * mean - SLOPE) / (CURVATURE * self.spread(self.at_end))

    def p(self, t: Tensor) -> Tensor:
        first = -1 / (self.beta * CURVATURE * self.spread(self.at_end) ** 2)
        return 1 / (first - self._whole(t) + self._whole(self.at_end))

    def value(self, x: Tensor, time: Tensor) -> Tensor:
        """V̂, [M, 2]."""
        t = time[:, None]
        y = (x - (1 - t) * MEAN) / self.spread(t)
        return self.p(t) * (y + self.kappa) / self.spread(t)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_N, [2] each."""
        kept = self.p(torch.ones((), dtype=torch.float64)) / self.p(self.at_end)
        spread = self.spread(self.at_end)
        mean = (1 - self.end) * MEAN + spread * self.kappa * (kept - 1)
        return mean, (spread * kept).square()

    def reward(self) -> float:
        """E[r(x_N)]."""
        mean, variance = self.moments()
        return float((SLOPE * mean - CURVATURE * (mean.square() + variance) / 2).sum())


class OptimalPolicy(WorldPolicy):
    """u_θ = u_# − V̂ of the optimum, times `share`."""

    share = 1.0

    def output(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        with super().reference():
            frozen = super().output(x, time, condition)
        optimum = Optimum(self.noising.cleanest)
        return frozen - self.share * self.adapter_on * optimum.value(x, time)


class RestOfIt(nn.Module):
    """g_φ that makes V̂ the optimum's, times `share`."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.objective: list[VggFlow] = []  # not a module of it

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        (objective,) = self.objective
        output = objective.policy.output(x, time, condition)
        value = Optimum(FLOW.cleanest).value(x, time)
        return self.share * value - objective._guess(x, output, time[:, None], condition)


def at_the_optimum(h: float, share: float = 1.0) -> tuple[dict[str, Tensor], Tensor]:
    """Each loss term at random states of every step, [M] each, and ‖V̂‖²; share: of V̂."""
    policy = OptimalPolicy(GAUSSIAN).to("cpu", torch.float64)
    policy.share = share
    table, flow = table_of(policy, STEPS, eta=0.0), RestOfIt(share)
    objective = VggFlow(
        policy,
        LogReward(policy, WorldReward(GAUSSIAN), BETA),
        table,
        flow,
        boundary=1.0,
        difference=h,
    )
    flow.objective.append(objective)
    noise = rng.normal((STEPS + 1, 2), range(ROWS), seed=1, purpose="t", dtype=torch.float64)
    where = policy.condition(["bowl"] * ROWS)
    paths = Trajectories(noise, noise[:, 1:], where)
    row, step = torch.arange(ROWS).repeat_interleave(STEPS), torch.arange(STEPS).repeat(ROWS)
    found = objective.losses(Selection(paths, row, step).transitions())
    return dict(found.terms), found.metrics["value_gradient_sq"]


def test_the_losses_vanish_at_the_exact_value_gradient() -> None:
    """The residual's square falls with h²; matching and boundary are zero to rounding."""
    coarse, size = at_the_optimum(1e-2)
    fine, _ = at_the_optimum(1e-4)
    scale = float(size.mean())
    assert float(fine["forward"].max()) < 1e-24 * scale
    assert float(fine["boundary"].max()) < 1e-24 * scale
    assert float(fine["consistency"].max()) < 1e-4 * scale
    ratio = float(coarse["consistency"].mean() / fine["consistency"].mean())
    assert ratio == pytest.approx(1e4, rel=0.2)


def test_another_field_is_seen() -> None:
    """0.8 of it solves the linear equation, but not Bellman's, and misses the boundary."""
    terms, size = at_the_optimum(1e-4, share=0.8)
    scale = float(size.mean())
    assert float(terms["forward"].max()) < 1e-24 * scale
    assert float(terms["consistency"].mean()) > 1e-2 * scale
    assert float(terms["boundary"].mean()) > 1e-4 * scale


def test_the_optimum_in_closed_form_is_that_of_its_ode() -> None:
    """Many Euler steps of u_# − V̂ end with its mean and variance, which are not the target's."""
    policy = OptimalPolicy(GAUSSIAN).to("cpu", torch.float64)
    grid = torch.linspace(1, FLOW.cleanest, 2001, dtype=torch.float64)
    table = kernel_table(Schedule(grid, 1 - grid, grid), 0.0, "flow")
    ends = vector(-2.0, 0.0, 1.0)[:, None].expand(3, 2)  # affine: three points tell the whole map
    noise = torch.zeros(3, table.num_steps + 1, 2, dtype=torch.float64)
    noise[:, 0] = ends
    end = rollout(policy, table, noise, policy.condition(["bowl"] * 3)).clean
    mean, variance = Optimum(FLOW.cleanest).moments()
    torch.testing.assert_close(end[1], mean, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close((end[2] - end[1]).square(), variance, rtol=5e-3, atol=1e-4)
    spread = Optimum(FLOW.cleanest).spread(torch.tensor(FLOW.cleanest))
    wanted = 1 / (1 / spread.square() + BETA * CURVATURE)  # the target's variance
    assert bool((variance < 0.9 * wanted).all())


def test_a_run_comes_to_its_own_optimum(tmp_path: Path) -> None:
    """150 updates through the command line: E[r] of the ODE's optimum, above the target's, which
    is known, too. Seeds 0, 1, 2 reached 2.418 2.413 2.412 of 2.507; the target has 1.514."""
    file = tmp_path / "bowl.py"
    file.write_text(WORLD_FILE)
    options = {
        "experiment.method": "vgg-flow",
        "model.reward_adaptive_mode": "squared",
        "model.timestep_fraction": 0.25,
        "training.num_epochs": 150,
        "training.lr": 5e-3,
        "training.flow_lr": 5e-3,
        "sampling.num_steps": 40,
        "sampling.spacing": "trailing",
        "evaluation.images_per_prompt": 1000,
        "evaluation.batch_size": 1000,
        "logging.sample_freq": 0,
        "logging.save_freq": 1000,
        "saving.output_dir": tmp_path / "run",
    }
    given = [f"--config.{key}={value}" for key, value in options.items()]
    main(["train", f"--config={file}", "--exp_name=proof", *given])
    (found,) = (tmp_path / "run").glob("**/evaluation.json")
    figures = json.loads(found.read_text())
    before, after = figures["before"]["others"], figures["after"]["others"]

    best = Optimum(FLOW.cleanest).reward()
    assert after["reward"] == pytest.approx(best, abs=0.1 * (best - before["reward"]))
    assert after["reward"] > after["reward_target"]


WORLD_FILE = "from tests.test_vgg_flow import GAUSSIAN\n\nWORLD = GAUSSIAN\n"


# ---------------------------------------------------------------------- paths without noise


def test_the_transport_cost_is_that_of_the_change(scene: Scene) -> None:
    found = transport_cost(scene.policy, scene.table, scene.paths)
    assert found.shape == (ROWS, STEPS)
    for step in range(STEPS):
        length = float(scene.table.time[step] - scene.table.time[step + 1])
        change = scene.of(step) - scene.of(step, frozen=True)
        close(found[:, step], length * change.square().sum(1) / 2)
    assert float(found.min()) > 0


def test_paths_without_noise_have_no_path_kl(scene: Scene) -> None:
    assert scene.table.ode and not table_of(scene.policy, STEPS).ode
    with pytest.raises(ValueError, match="no density"):
        path_ratio(scene.policy, scene.table, scene.paths)


def ring(out: Path, **options: object) -> list[str]:
    values = {
        "experiment.method": "vgg-flow",
        "sampling.num_steps": 5,
        "sampling.batch_size": 8,
        "training.batch_size": 8,
        "training.num_epochs": 2,
        "evaluation.images_per_prompt": 120,
        "logging.sample_freq": 2,
        "logging.num_samples": 120,
        "logging.samples_per_prompt": 120,
        "guard.min_diversity": 0.1,
        "saving.output_dir": out,
        **options,
    }
    return [f"--config.{key}={value}" for key, value in values.items()]


def plain(value: object) -> Iterator[object]:
    """Every leaf of what JSON has."""
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(parts, str) or not hasattr(parts, "__iter__"):
        yield parts
    else:
        for part in parts:
            yield from plain(part)


def test_a_run_is_measured_without_a_path_kl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", "--config=worlds/ring-flow", "--exp_name=run", *ring(tmp_path)])
    assert "transport cost" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    folder = RunFolder(path)
    rows = folder.metrics()
    assert "probe_path_kl" not in rows[-1] and rows[-1]["probe_transport_cost"] > 0
    assert {"loss_forward", "loss_consistency", "loss_boundary"} <= set(rows[-1])
    measured = folder.read_json("evaluation.json")
    assert measured["before"]["path_kl"] is measured["after"]["path_kl"] is None
    assert measured["before"]["transport_cost"] == 0 < measured["after"]["transport_cost"]
    assert "against_target" not in measured

    found = evaluate_run(path, EvaluationRequest(images_per_prompt=120), show=False)
    again = evaluate_run(
        path, EvaluationRequest(images_per_prompt=120), show=False
    )  # as it was read
    assert again == found
    base, tuned = found["models"]
    assert "path_kl" not in tuned["figures"] and "transport_cost" not in base["figures"]
    assert tuned["figures"]["transport_cost"]["value"] > 0
    made = tuned["certificate"]
    assert set(made["figures"]) == {"least_kl"} and made["beta"] is None
    assert "without noise" in made["why"] and made["step_kl"] == []
    for file in (*path.glob("*.json"), *path.glob("evaluation/*/*.json")):
        read = json.loads(file.read_text())
        assert not any(isinstance(v, float) and not math.isfinite(v) for v in plain(read)), file
    build_report(folder)
    with pytest.raises(ConfigError, match="without noise"):
        evaluate_run(path, EvaluationRequest(resample=4), show=False)


def test_its_sampler_is_the_ode_on_the_grid_of_the_others() -> None:
    config = load_config("worlds/ring-flow")
    policy = WorldPolicy(worlds.load("ring-flow"))
    noisy = build_kernel(config, policy)
    set_option(config, "experiment.method", "vgg-flow")
    ode = build_kernel(config, policy)
    assert ode.ode and torch.equal(ode.time, noisy.time) and not noisy.ode
    assert target_of(config).beta is None


@pytest.mark.parametrize(
    ("key", "value", "scheduler"),
    [("guard.max_path_kl", 1.0, "ddpm"), ("sampling.eta", 0.5, "ddim")],
)
def test_what_needs_noise_is_refused(key: str, value: float, scheduler: str) -> None:
    config = load_config("worlds/ring-flow")
    set_option(config, "experiment.method", "vgg-flow")
    set_option(config, "sampling.scheduler", scheduler)
    check_settings(config)
    set_option(config, key, value)
    with pytest.raises(ConfigError, match=f"config.{key}=") as caught:
        check_settings(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("world", ["ring", "prompts"])
def test_models_that_are_no_flow_models_are_refused(
    world: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["train", f"--config=worlds/{world}", "--exp_name=run", *ring(tmp_path)])
    said = capsys.readouterr().err.strip()
    assert f"config.pretrained.model=worlds/{world} predicts epsilon" in said
    assert "\n" not in said and not list(tmp_path.iterdir())


def test_a_pipeline_with_eps_is_refused(tmp_path: Path) -> None:
    kind = KINDS[1]
    config = method_config("vgg-flow", tmp_path)
    with pytest.raises(ConfigError, match="predicts epsilon"):
        kind.trainer(config)
    assert not list(tmp_path.iterdir())


def test_a_flow_that_ends_without_noise_is_a_path_of_it() -> None:
    """t_N = 0, as flow models are sampled: E[x_N|x] is x̂, and γ = (1 − t)²."""
    noising = LinearNoising()
    world = replace(GAUSSIAN, noising=noising)
    policy = WorldPolicy(world).to("cpu", torch.float64)
    randomise(policy.parameters(), 0.1)
    table = kernel_table(schedule_of(noising, [1.0, 0.6, 0.004]), 0.0, "flow")
    objective = VggFlow(
        policy,
        LogReward(policy, WorldReward(world), BETA),
        table,
        PlaneFlow(noising, 2, 1, 0).double(),
    )
    noise = torch.randn(4, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    paths = rollout(policy, table, noise, policy.condition(["bowl"] * 4))
    for step in range(3):
        chosen = Selection(paths, torch.arange(4), torch.full((4,), step))
        found = objective.losses(chosen.transitions())
        assert all(bool(term.isfinite().all()) for term in found.terms.values())
        t = table.time[step]
        x_clean = paths.x[:, step] - t * paths.output[:, step]
        guess = BETA * (1 - t) ** 2 * (SLOPE - CURVATURE * x_clean)
        close(found.vectors["value_gradient"], guess)
