"""∇-DB(λ) and Adjoint Matching (docs/nabla_db_lambda.md): reductions, returns, gradients, cost."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nablagfn import kernels, rng
from nablagfn.bellman import lambda_returns, pull_back
from nablagfn.counting import Counts, counted
from nablagfn.estimators.adjoint_matching import AdjointMatching
from nablagfn.estimators.guess import Guess
from nablagfn.estimators.nabla_db_lambda import NablaDBLambda
from nablagfn.estimators.terminal_gradient import TerminalGradient
from nablagfn.kernels import KernelTable
from nablagfn.lookahead import LogReward, guess, terminal_gradient
from nablagfn.objectives.matching import MatchingObjective, residual_score
from nablagfn.rollout import WindowChoice, rollout
from nablagfn.types import Losses, Policy, Selection
from nablagfn.value_gradient import Estimator, mean_square
from tests.worlds import MixtureWorld, PlaneFlow, randomise, tilt

PROMPTS = ("a", "bbb", "cc", "dddd")
STEPS = 7
BETA = 1.5


@dataclass(frozen=True)
class Scene:
    """Four float64 paths of a world whose adapter is not at its start, and some transitions."""

    world: MixtureWorld
    table: KernelTable
    chosen: Selection

    @property
    def log_reward(self) -> LogReward:
        return LogReward(self.world, tilt, BETA)

    def flow(self) -> PlaneFlow:
        flow = PlaneFlow(self.world.alphas_cumprod, 16, seed=5)
        randomise(list(flow.parameters()), 0.3, seed=6)
        return flow

    def ours(self, flow: PlaneFlow | None, lam: float, policy: Policy | None = None, **options):
        settings = {"weight": "std", "frozen_guess": True, "chunk": 3, **options}
        policy = policy or self.world
        log_reward = LogReward(policy, tilt, BETA)
        return NablaDBLambda(policy, log_reward, self.table, "squared", flow, lam=lam, **settings)

    def losses(self, estimator: Estimator, weight: str = "std") -> Losses:
        objective = MatchingObjective(self.world, self.table, estimator, weight=weight)
        batch = self.chosen.transitions(objective.prepare(self.chosen))
        return objective.losses(batch)


def select(paths, steps: list[list[int]]) -> Selection:
    row = torch.cat([torch.full((len(own),), i) for i, own in enumerate(steps)])
    return Selection(paths, row, torch.tensor([k for own in steps for k in own]))


@pytest.fixture
def scene() -> Scene:
    world = MixtureWorld(seed=1)
    randomise(world.parameters(), 0.2)
    table = kernels.ddim(world.alphas_cumprod, world.timesteps("ddpm", STEPS))
    noise = rng.normal((STEPS + 1, 2), range(4), seed=0, purpose="noise", dtype=torch.float64)
    paths = rollout(world, table, noise, world.condition(PROMPTS))
    steps = [[0, 3, STEPS - 1], [2, 4, STEPS - 1], [1, 5, STEPS - 1], [3, 3, STEPS - 1]]
    return Scene(world, table, select(paths, steps))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * float(other.abs().max()))


# ------------------------------------------------------------------------------ reductions


def test_lambda_one_without_flow_is_adjoint_matching(scene: Scene) -> None:
    ours = scene.losses(scene.ours(None, 1.0)).terms
    theirs = scene.losses(AdjointMatching(scene.world, scene.log_reward, scene.table, chunk=2))
    close(ours["forward"], theirs.terms["forward"])
    assert float(ours["forward"].min()) > 1e-4 and ours.keys() == theirs.terms.keys()


@pytest.mark.parametrize("frozen", [True, False])
def test_lambda_zero_with_zero_flow_is_no_flow(scene: Scene, frozen: bool) -> None:
    """Loss and gradient, whichever model guesses."""
    zero = PlaneFlow(scene.world.alphas_cumprod, 16, seed=5)
    no_flow = Guess(scene.world, scene.log_reward, "squared", frozen_guess=frozen)
    gradients = []
    for estimator in (scene.ours(zero, 0.0, frozen_guess=frozen), no_flow):
        forward = scene.losses(estimator).terms["forward"]
        gradients.append([forward, *torch.autograd.grad(forward.sum(), scene.world.parameters())])
    for one, other in zip(*gradients, strict=True):
        close(one, other)
    assert float(gradients[0][0].min()) > 1e-4


def test_a_window_over_everything_is_the_whole_return(scene: Scene) -> None:
    whole = Scene(scene.world, scene.table, select(scene.chosen.paths, [list(range(STEPS))] * 4))
    flow = scene.flow()
    window, full = (whole.losses(whole.ours(flow, 0.7, window=w)).terms for w in (True, False))
    close(window["forward"], full["forward"])
    close(window["bellman"], full["bellman"])


def test_a_window_of_one_is_lambda_zero(scene: Scene) -> None:
    single = Scene(scene.world, scene.table, select(scene.chosen.paths, [[0], [3], [5], [6]]))
    flow = scene.flow()
    window = single.losses(single.ours(flow, 0.9, window=True)).terms
    bootstrap = single.losses(single.ours(flow, 0.0)).terms
    close(window["forward"], bootstrap["forward"])
    close(window["bellman"], bootstrap["bellman"])


# ------------------------------------------------------------------------------ the adjoint


def test_the_lean_adjoint_is_autograd_through_the_frozen_chain(scene: Scene) -> None:
    """d βr(x_N)/dx_k along x_{k+1} = m_#(x_k) + what the drawn path added."""
    paths, world = scene.chosen.paths, scene.world
    x = paths.x[:, 0].clone().requires_grad_()
    visited = [x]
    with world.reference():
        for step in range(STEPS):
            k = scene.table.at_step(step, x)
            m = kernels.mean(visited[-1], world.eps(visited[-1], k.timestep, paths.condition), k)
            visited.append(m + (paths.x[:, step + 1] - m).detach())
    value = scene.log_reward(visited[-1], paths.condition).sum()
    expected = torch.stack(torch.autograd.grad(value, visited), 1)
    end = terminal_gradient(scene.log_reward, paths.clean, paths.condition)
    start = torch.zeros(4, dtype=torch.long)
    found = lambda_returns(world, scene.table, paths.x, start, paths.condition, end, lam=1.0)
    close(found.back, expected)
    estimator = AdjointMatching(world, scene.log_reward, scene.table, chunk=3)
    signal = estimator.prepare(scene.chosen)["adjoint"]
    close(signal, expected[scene.chosen.row, scene.chosen.step + 1])


def test_adjoint_matching_loss_is_the_paper_s(scene: Scene) -> None:
    """‖(m_θ − m_#)/σ − σ·a_{k+1}‖²: the control minus σ times the adjoint, elementwise mean."""
    estimator = AdjointMatching(scene.world, scene.log_reward, scene.table, chunk=4)
    batch = scene.chosen.transitions(estimator.prepare(scene.chosen))
    k = scene.table.at(batch.step, batch.x)
    eps = scene.world.eps(batch.x, k.timestep, batch.condition)
    with scene.world.reference():
        eps_ref = scene.world.eps(batch.x, k.timestep, batch.condition)
    control = (kernels.mean(batch.x, eps, k) - kernels.mean(batch.x, eps_ref, k)) / k.std
    expected = (control - k.std * batch.signals["adjoint"]).square().mean(1)
    close(scene.losses(estimator).terms["forward"], expected)


def test_terminal_gradient_is_that_of_the_own_path(scene: Scene) -> None:
    clean = scene.chosen.paths.clean.clone().requires_grad_()
    weight = torch.tensor([float(len(p)) for p in PROMPTS], dtype=torch.float64)
    value = weight * clean[:, 0] + (2 * clean[:, 1]).sin() + 0.1 * clean.square().mean(1)
    (expected,) = torch.autograd.grad(BETA * value.sum(), clean)
    found = TerminalGradient(scene.log_reward, chunk=3).prepare(scene.chosen)
    close(found["terminal_gradient"], expected[scene.chosen.row])


# ------------------------------------------------------------------------------ the return


def test_returns_against_the_recursion_row_by_row(scene: Scene) -> None:
    """G and v by one transition at a time, from the formulas."""
    flow, lam, paths = scene.flow(), 0.6, scene.chosen.paths
    estimator = scene.ours(flow, lam)
    found = estimator.prepare(scene.chosen)
    for i, (row, step) in enumerate(zip(scene.chosen.row, scene.chosen.step, strict=True)):
        own = paths[row[None]]
        back = mixed = terminal_gradient(scene.log_reward, own.clean, own.condition)
        for j in range(STEPS - 1, int(step) - 1, -1):
            after = mixed
            k = scene.table.at_step(j, own.x[:, j])
            back = pull_back(scene.world, own.x[:, j], k, own.condition, mixed)
            if j > int(step):
                came = scene.table.at_step(j - 1, own.x[:, j])
                with scene.world.reference():
                    known = guess(
                        scene.log_reward, scene.world, own.x[:, j], came, own.condition, "squared"
                    ).gradient
                v = known + flow(own.x[:, j], came.timestep_next, own.condition).detach()
                mixed = (1 - lam) * v + lam * back
        close(found["return"][i], back[0])
        close(found["return_next"][i], after[0])


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.6])
def test_the_flow_s_loss_is_the_distance_of_v_from_the_return(
    scene: Scene, lam: float, frozen: bool
) -> None:
    flow = scene.flow()
    estimator = scene.ours(flow, lam, frozen_guess=frozen)
    signals = estimator.prepare(scene.chosen)
    batch = scene.chosen.transitions(signals)
    k = scene.table.at(batch.step, batch.x)
    if lam == 0:
        v = estimator.value(batch.x_next, k, batch.condition)
        back = pull_back(scene.world, batch.x, k, batch.condition, v)
    else:
        back = signals["return"]
    x = batch.x.clone().requires_grad_()
    if frozen:
        with scene.world.reference():
            eps = scene.world.eps(x, k.timestep, batch.condition)
    else:
        eps = scene.world.eps(x, k.timestep, batch.condition)
    value = scene.log_reward(kernels.predict_clean(x, eps, k.alpha_bar), batch.condition)
    (known,) = torch.autograd.grad((k.alpha_bar[:, 0] * value).sum(), x)
    learned = flow(batch.x, k.timestep, batch.condition)
    close(scene.losses(estimator).terms["bellman"], mean_square(k.std * (known + learned - back)))


def test_the_hint_is_the_guess_s_x_clean_at_both_ends(scene: Scene) -> None:
    """g_φ sees x̂_#(x_{k+1}) for v̂ and x̂_#(x_k) for its own loss; at the clean end x itself."""
    seen: list[Tensor] = []

    class Spy(PlaneFlow):
        def forward(self, x, timestep, condition, hint=None):
            seen.append(hint.detach())
            return super().forward(x, timestep, condition, hint)

    flow = Spy(scene.world.alphas_cumprod, 16, seed=5, hint=2)
    scene.losses(scene.ours(flow, 0.0, hint=True))
    batch = scene.chosen.transitions({})
    k = scene.table.at(batch.step, batch.x)
    with scene.world.reference(), torch.no_grad():
        after = scene.world.eps(batch.x_next, k.timestep_next, batch.condition)
        here = scene.world.eps(batch.x, k.timestep, batch.condition)
    after = kernels.predict_clean(batch.x_next, after, k.alpha_bar_next)
    after = torch.where(k.last[:, None], batch.x_next, after)
    close(seen[0], after)
    close(seen[1], kernels.predict_clean(batch.x, here, k.alpha_bar))


def test_v_is_exact_at_the_clean_end(scene: Scene) -> None:
    """Whatever g_φ says there."""
    batch = scene.chosen.transitions({})
    last = batch.step == STEPS - 1
    k = scene.table.at(batch.step, batch.x)
    found = scene.ours(scene.flow(), 0.0).value(batch.x_next, k, batch.condition)
    exact = terminal_gradient(scene.log_reward, batch.x_next, batch.condition)
    close(found[last], exact[last])
    assert float((found - exact)[~last].abs().min()) > 1e-6


def test_each_term_trains_its_own_parameters(scene: Scene) -> None:
    flow = scene.flow()
    terms = scene.losses(scene.ours(flow, 0.0)).terms
    theta, phi = scene.world.parameters(), list(flow.parameters())
    for name, mine, others in (("forward", theta, phi), ("bellman", phi, theta)):
        grads = torch.autograd.grad(
            terms[name].sum(), [*mine, *others], allow_unused=True, retain_graph=True
        )
        assert all(g is not None and bool((g != 0).any()) for g in grads[: len(mine)])
        assert all(g is None for g in grads[len(mine) :])


def test_the_chunk_changes_nothing(scene: Scene) -> None:
    flow = scene.flow()
    one, four = (scene.losses(scene.ours(flow, 0.8, chunk=c)).total() for c in (1, 4))
    close(one, four)


def test_bellman_s_equation_holds_where_the_value_is_linear() -> None:
    """One Gaussian, linear reward: log F̃ is linear at every step, so V(x_k) = J_#ᵀ V(x_{k+1})
    without an expectation, and the policy that it defines has zero loss."""
    world = MixtureWorld()
    world.means, world.weights = world.means[:1], torch.ones(1, dtype=torch.float64)
    table = kernels.ddim(world.alphas_cumprod, world.timesteps("ddpm", STEPS))
    noise = rng.normal((STEPS + 1, 2), range(6), seed=0, purpose="noise", dtype=torch.float64)
    paths = rollout(world, table, noise, world.condition([""] * 6))
    slope = torch.tensor([1.0, -0.5], dtype=torch.float64).expand(6, 2)
    start = torch.zeros(6, dtype=torch.long)
    back = lambda_returns(world, table, paths.x, start, paths.condition, slope, lam=1.0).back
    close(back, back[:1].expand_as(back))  # the same for every path: no variance
    for step in range(STEPS):
        k = table.at_step(step, paths.x[:, step])
        tilted = k.std**2 / k.c2 * back[:, step + 1]  # ε_θ − ε_# of the optimal policy
        zero = torch.zeros_like(tilted)
        score = residual_score(paths.x[:, step], paths.x[:, step + 1], tilted, zero, k)
        close(score, back[:, step + 1])


# ------------------------------------------------------------------------------ windows, cost


def test_windows_are_consecutive_inside_and_reach_every_step() -> None:
    seen = torch.zeros(20)
    for seed in range(600):
        steps = WindowChoice(6)(20, torch.Generator().manual_seed(seed))
        assert torch.equal(steps.diff(), torch.ones(5, dtype=torch.long))
        seen[steps] += 1
    share = seen / seen.sum() * 20
    assert float(share.min()) > 0.6 and float(share.max()) < 1.8
    assert torch.equal(WindowChoice(9)(4, torch.Generator()), torch.arange(4))


def cost(scene: Scene, make) -> tuple[int, int]:
    """Model and decode evaluations of one update, without the rollout."""
    counts = Counts()
    policy = counted(scene.world, counts)
    objective = MatchingObjective(policy, scene.table, make(policy), weight="std")
    batch = scene.chosen.transitions(objective.prepare(scene.chosen))
    objective.losses(batch).total().sum().backward()
    return counts.model, counts.decode


def test_the_documented_cost_is_what_is_counted(scene: Scene) -> None:
    """docs/nabla_db_lambda.md, with n = 3 transitions of 4 paths, N = 7, k₀ = 0; four of the
    transitions are last ones, whose guess needs no denoiser."""
    transitions, paths, guesses = 12, 4, 2 * (12 - 4)
    flow = scene.flow()

    def log_reward(policy: Policy) -> LogReward:
        return LogReward(policy, tilt, BETA)

    found = {
        "no_flow": cost(scene, lambda p: Guess(p, log_reward(p), "squared")),
        "lambda": cost(scene, lambda p: scene.ours(flow, 0.0, p)),
        "finetuned": cost(scene, lambda p: scene.ours(flow, 0.0, p, frozen_guess=False)),
        "adjoint": cost(scene, lambda p: AdjointMatching(p, log_reward(p), scene.table, chunk=4)),
        "terminal": cost(scene, lambda p: TerminalGradient(log_reward(p), chunk=4)),
    }
    assert found == {
        "no_flow": (3 * transitions + guesses, transitions),
        "lambda": (4 * transitions + guesses, 2 * transitions),
        "finetuned": (5 * transitions + guesses, 2 * transitions),
        "adjoint": (3 * transitions + 2 * paths * (STEPS - 1), paths),
        "terminal": (3 * transitions, paths),
    }
