"""∇-DB(λ) and Adjoint Matching (docs/nabla_db_lambda.md): reductions, returns, gradients, cost."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from nablagfn.core import kernels, rng
from nablagfn.core.bellman import Backed, Pass, returns
from nablagfn.core.counting import Counts, counted
from nablagfn.core.kernels import KernelTable, Step
from nablagfn.core.log_reward import LogReward, terminal_gradient
from nablagfn.core.lookahead import Guessed, How, guess
from nablagfn.core.rollout import WindowChoice, rollout
from nablagfn.core.types import (
    Condition,
    Losses,
    Policy,
    Selection,
    Trajectories,
    Transitions,
)
from nablagfn.core.value_gradient import Estimator, mean_square, shortened
from nablagfn.methods.estimators.adjoint_matching import AdjointMatching
from nablagfn.methods.estimators.guess import Guess
from nablagfn.methods.estimators.nabla_db_lambda import NablaDBLambda, ReturnAhead, mirrored
from nablagfn.methods.estimators.terminal_gradient import TerminalGradient
from nablagfn.methods.objectives.matching import MatchingObjective, residual_score
from tests.tables import table_of
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
    table = table_of(world, STEPS)
    noise = rng.normal((STEPS + 1, 2), range(4), seed=0, purpose="noise", dtype=torch.float64)
    paths = rollout(world, table, noise, world.condition(PROMPTS))
    steps = [[0, 3, STEPS - 1], [2, 4, STEPS - 1], [1, 5, STEPS - 1], [3, 3, STEPS - 1]]
    return Scene(world, table, select(paths, steps))


def pull_back(policy: Policy, x: Tensor, k: Step, condition: Condition, v: Tensor) -> Tensor:
    """J_{m_#}(x_k)ᵀ v by a pass of its own."""
    x = x.detach().requires_grad_()
    with policy.reference():
        m = kernels.mean(x, policy.output(x, k.here.time, condition), k)
        return torch.autograd.grad(m, x, v)[0]


def guess_at(scene: Scene, x: Tensor, k: Step, condition: Condition, frozen: bool) -> Guessed:
    """The guess at x_k by passes of its own: that at x_{k+1} of a step that leads to x_k."""
    no, all_rows = torch.zeros_like(k.last), torch.arange(len(x))
    into = replace(k, next=k.here, last=no, noisy=all_rows)
    with scene.world.reference() if frozen else nullcontext():
        return guess(scene.log_reward, scene.world, x, into, condition, "squared")


def adjoints(scene: Scene, paths: Trajectories, end: Tensor) -> Tensor:
    """a_0 … a_N of whole paths, [B, N+1, ...]."""

    def always(here: Pass, v_next: Tensor, at_start: bool) -> Backed:
        return Backed(mixed=here.pull_back(v_next))

    start = torch.zeros(len(paths.condition), dtype=torch.long)
    found = returns(scene.world, scene.table, paths.x, start, paths.condition, end, always)
    return found.mixed


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
            output = world.output(visited[-1], k.here.time, paths.condition)
            m = kernels.mean(visited[-1], output, k)
            visited.append(m + (paths.x[:, step + 1] - m).detach())
    value = scene.log_reward(visited[-1], paths.condition).sum()
    expected = torch.stack(torch.autograd.grad(value, visited), 1)
    end = terminal_gradient(scene.log_reward, paths.clean, paths.condition)
    close(adjoints(scene, paths, end), expected)
    estimator = AdjointMatching(world, scene.log_reward, scene.table, chunk=3)
    signal = estimator.prepare(scene.chosen).return_next
    close(signal, expected[scene.chosen.row, scene.chosen.step + 1])


def test_adjoint_matching_loss_is_the_paper_s(scene: Scene) -> None:
    """‖(m_θ − m_#)/σ − σ·a_{k+1}‖²: the control minus σ times the adjoint, elementwise mean."""
    estimator = AdjointMatching(scene.world, scene.log_reward, scene.table, chunk=4)
    batch = scene.chosen.transitions(estimator.prepare(scene.chosen))
    k = scene.table.at(batch.step, batch.x)
    eps = scene.world.output(batch.x, k.here.time, batch.condition)
    with scene.world.reference():
        output_ref = scene.world.output(batch.x, k.here.time, batch.condition)
    control = (kernels.mean(batch.x, eps, k) - kernels.mean(batch.x, output_ref, k)) / k.std
    expected = (control - k.std * batch.signals.return_next).square().mean(1)
    close(scene.losses(estimator).terms["forward"], expected)


def test_terminal_gradient_is_that_of_the_own_path(scene: Scene) -> None:
    clean = scene.chosen.paths.clean.clone().requires_grad_()
    weight = torch.tensor([float(len(p)) for p in PROMPTS], dtype=torch.float64)
    value = weight * clean[:, 0] + (2 * clean[:, 1]).sin() + 0.1 * clean.square().mean(1)
    (expected,) = torch.autograd.grad(BETA * value.sum(), clean)
    found = TerminalGradient(scene.log_reward, chunk=3).prepare(scene.chosen)
    close(found.gradient, expected[scene.chosen.row])


# ------------------------------------------------------------------------------ the return


WINDOWS = [[0, 1, 2], [2, 3, 4], [4, 5, 6], [3, 4, 5]]  # the third ends at x_N


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("lam", "window"), [(0.6, False), (0.6, True), (0.0, True), (1.0, True)])
def test_signals_against_the_recursion_row_by_row(
    scene: Scene, lam: float, window: bool, frozen: bool
) -> None:
    """One transition at a time from the formulas, every quantity by a pass of its own."""
    flow = PlaneFlow(scene.world.alphas_cumprod, 16, seed=5, hint=2)
    randomise(list(flow.parameters()), 0.3, seed=6)
    chosen = select(scene.chosen.paths, WINDOWS) if window else scene.chosen
    found = scene.ours(flow, lam, window=window, frozen_guess=frozen, hint=True).prepare(chosen)

    def value(x: Tensor, k: Step, condition: Condition) -> Tensor:
        known = guess_at(scene, x, k, condition, frozen)
        return known.gradient + flow(x, k.here.time, condition, known.x_clean).detach()

    for i, (row, step) in enumerate(zip(chosen.row, chosen.step, strict=True)):
        own = chosen.paths[row[None]]
        stop = WINDOWS[int(row)][-1] + 1 if window else STEPS
        back = mixed = terminal_gradient(scene.log_reward, own.clean, own.condition)
        if stop < STEPS:
            k = scene.table.at_step(stop, own.x[:, stop])
            mixed = value(own.x[:, stop], k, own.condition)
        for j in range(stop - 1, int(step) - 1, -1):
            after, x = mixed, own.x[:, j]
            k = scene.table.at_step(j, x)
            back = pull_back(scene.world, x, k, own.condition, after)
            mixed = (1 - lam) * value(x, k, own.condition) + lam * back
        known = guess_at(scene, x, k, own.condition, frozen).gradient
        with scene.world.reference():
            output_ref = scene.world.output(x, k.here.time, own.condition)
        close(found.return_next[i], after[0])
        close(found.return_rest[i], (back - known)[0])
        close(found.output_ref[i], output_ref[0])


def test_the_loss_uses_the_frozen_prediction_of_the_sweep(scene: Scene) -> None:
    """Without the signal it is evaluated again, to the same loss."""
    estimator = scene.ours(scene.flow(), 0.6)
    objective = MatchingObjective(scene.world, scene.table, estimator, strength=0.8)
    signals = estimator.prepare(scene.chosen)
    handed_on = objective.losses(scene.chosen.transitions(signals)).total()
    off = objective.losses(
        scene.chosen.transitions(replace(signals, output_ref=signals.output_ref + 1))
    ).total()
    signals = replace(signals, output_ref=None)
    close(handed_on, objective.losses(scene.chosen.transitions(signals)).total())
    assert float((off - handed_on).abs().min()) > 1e-6


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
    v = signals.return_next if lam else estimator.value(batch.x_next, k, batch.condition)
    back = pull_back(scene.world, batch.x, k, batch.condition, v)
    x = batch.x.clone().requires_grad_()
    if frozen:
        with scene.world.reference():
            eps = scene.world.output(x, k.here.time, batch.condition)
    else:
        eps = scene.world.output(x, k.here.time, batch.condition)
    value = scene.log_reward(kernels.predict_clean(x, eps, k.here), batch.condition)
    (known,) = torch.autograd.grad((k.here.alpha_bar[:, 0] * value).sum(), x)
    learned = flow(batch.x, k.here.time, batch.condition)
    close(scene.losses(estimator).terms["bellman"], mean_square(k.std * (known + learned - back)))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.6])
def test_the_flow_learns_what_a_guess_without_the_jacobian_misses(
    scene: Scene, lam: float, frozen: bool
) -> None:
    """G_k less γβ∇r(x̂), with and without a sweep."""
    flow, how = scene.flow(), How("no-jacobian")
    estimator = scene.ours(flow, lam, frozen_guess=frozen, how=how)
    signals = estimator.prepare(scene.chosen)
    batch = scene.chosen.transitions(signals)
    k = scene.table.at(batch.step, batch.x)
    v = signals.return_next if lam else estimator.value(batch.x_next, k, batch.condition)
    back = pull_back(scene.world, batch.x, k, batch.condition, v)
    with scene.world.reference() if frozen else nullcontext(), torch.no_grad():
        eps = scene.world.output(batch.x, k.here.time, batch.condition)
    clean = kernels.predict_clean(batch.x, eps, k.here).requires_grad_()
    (slope,) = torch.autograd.grad(scene.log_reward(clean, batch.condition).sum(), clean)
    known = k.here.alpha_bar * slope
    learned = flow(batch.x, k.here.time, batch.condition)
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
    batch = scene.chosen.transitions()
    k = scene.table.at(batch.step, batch.x)
    with scene.world.reference(), torch.no_grad():
        after = scene.world.output(batch.x_next, k.next.time, batch.condition)
        here = scene.world.output(batch.x, k.here.time, batch.condition)
    after = kernels.predict_clean(batch.x_next, after, k.next)
    after = torch.where(k.last[:, None], batch.x_next, after)
    close(seen[0], after)
    close(seen[1], kernels.predict_clean(batch.x, here, k.here))


def test_v_is_exact_at_the_clean_end(scene: Scene) -> None:
    """Whatever g_φ says there."""
    batch = scene.chosen.transitions()
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
    table = table_of(world, STEPS)
    noise = rng.normal((STEPS + 1, 2), range(6), seed=0, purpose="noise", dtype=torch.float64)
    paths = rollout(world, table, noise, world.condition([""] * 6))
    slope = torch.tensor([1.0, -0.5], dtype=torch.float64).expand(6, 2)
    back = adjoints(Scene(world, table, select(paths, [[0]] * 6)), paths, slope)
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
    transitions are last ones, whose guess needs no denoiser. One of the four windows ends at x_N.
    """
    transitions, paths, guesses = 12, 4, 2 * (12 - 4)
    flow = scene.flow()
    windows = Scene(scene.world, scene.table, select(scene.chosen.paths, WINDOWS))

    def log_reward(policy: Policy) -> LogReward:
        return LogReward(policy, tilt, BETA)

    found = {
        "no_flow": cost(scene, lambda p: Guess(p, log_reward(p), "squared")),
        "lambda": cost(scene, lambda p: scene.ours(flow, 0.0, p)),
        "finetuned": cost(scene, lambda p: scene.ours(flow, 0.0, p, frozen_guess=False)),
        "adjoint": cost(scene, lambda p: AdjointMatching(p, log_reward(p), scene.table, chunk=4)),
        "terminal": cost(scene, lambda p: TerminalGradient(log_reward(p), chunk=4)),
        "whole": cost(scene, lambda p: scene.ours(flow, 0.5, p)),
        "window": cost(windows, lambda p: scene.ours(flow, 0.5, p, window=True)),
        "window, finetuned": cost(
            windows, lambda p: scene.ours(flow, 0.5, p, window=True, frozen_guess=False)
        ),
        "window, no Jacobian": cost(
            windows, lambda p: scene.ours(flow, 0.5, p, window=True, how=How("no-jacobian"))
        ),
        "window, guess alone": cost(windows, lambda p: scene.ours(None, 0.5, p, window=True)),
    }
    assert found == {
        "no_flow": (3 * transitions + guesses, transitions),
        "lambda": (4 * transitions + guesses, 2 * transitions),
        "finetuned": (5 * transitions + guesses, 2 * transitions),
        "adjoint": (2 * transitions + paths * (2 * STEPS - 1), paths),
        "terminal": (3 * transitions, paths),
        "whole": (2 * transitions + paths * (3 * STEPS - 1), paths * (STEPS + 1)),
        "window": (5 * transitions + paths - 2, transitions + paths),
        "window, finetuned": (6 * transitions + 2 * paths - 2, transitions + paths),
        "window, no Jacobian": (4 * transitions + paths - 1, transitions + paths),
        "window, guess alone": (5 * transitions - 2, transitions),
    }


# ------------------------------------------------------------------------ mirror, quantile


def test_the_mirror_is_about_the_mean_of_what_drew_the_step(scene: Scene) -> None:
    """Also after an update, when the policy's own mean is another one."""
    batch = scene.chosen.transitions()
    drawn = scene.world.output(
        batch.x, scene.table.at(batch.step, batch.x).here.time, batch.condition
    )
    randomise(scene.world.parameters(), 0.2, seed=9)
    k = scene.table.at(batch.step, batch.x)
    noise = (batch.x_next - kernels.mean(batch.x, drawn.detach(), k)) / k.std
    opposite = kernels.mean(batch.x, drawn.detach(), k) - k.std * noise
    close(mirrored(batch, k), opposite)
    ours = scene.ours(None, 0.0, mirror=True)
    found = ours.ahead(batch, k, batch.x, drawn.detach())
    assert isinstance(found, ReturnAhead)
    both = [ours.value(x, k, batch.condition) for x in (batch.x_next, opposite)]
    close(found.return_next, (both[0] + both[1]) / 2)
    assert not torch.allclose(both[0], both[1])


def test_the_mirror_cancels_the_odd_part_of_the_noise(scene: Scene) -> None:
    """A step and its opposite have one v̂: half of what the noise did to V is gone, exactly."""
    batch = scene.chosen.transitions()
    k = scene.table.at(batch.step, batch.x)
    there = replace(batch, x_next=mirrored(batch, k))
    ours, plain = scene.ours(None, 0.0, mirror=True), scene.ours(None, 0.0)
    output_ref = batch.output_old

    def at(estimator: Estimator, of: Transitions) -> Tensor:
        found = estimator.ahead(of, k, of.x, output_ref)
        assert isinstance(found, ReturnAhead)
        return found.return_next

    close(at(ours, batch), at(ours, there))
    assert not torch.allclose(at(plain, batch), at(plain, there))


def test_long_value_gradients_are_shortened_to_a_quantile(scene: Scene) -> None:
    """In units of the step, of all of an update's transitions, whatever the chunk."""
    estimator = AdjointMatching(scene.world, scene.log_reward, scene.table, chunk=2)
    plain = MatchingObjective(scene.world, scene.table, estimator)
    clipped = MatchingObjective(scene.world, scene.table, estimator, quantile=0.5)
    v, short = (o.prepare(scene.chosen).return_next for o in (plain, clipped))
    std = scene.table.at(scene.chosen.step, v).std.flatten()
    length, now = (std * a.norm(dim=1) for a in (v, short))
    close(now, length.clamp(max=length.median() if len(length) % 2 else length.quantile(0.5)))
    close(short / now[:, None], v / length[:, None])
    assert int((now < length).sum()) == len(length) // 2


def test_no_length_is_no_trouble() -> None:
    nothing = torch.zeros(3, 2)
    assert torch.equal(shortened(nothing, torch.ones(3, 1), 0.5), nothing)
