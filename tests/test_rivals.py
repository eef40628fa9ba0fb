"""ReFL, DRaFT, AlignProp, DDPO and DAG-DB against formulas of their own; the contract of all."""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nablagfn.config import Config, ConfigError, set_option
from nablagfn.core import kernels
from nablagfn.core.bellman import adjoint, returns
from nablagfn.core.kernels import KernelTable
from nablagfn.core.log_reward import LogReward, terminal_gradient
from nablagfn.core.rollout import noise_of, replay, rollout
from nablagfn.core.types import (
    Condition,
    Metadata,
    Objective,
    Policy,
    Pooled,
    Reward,
    Selection,
    Trajectories,
    Transitions,
)
from nablagfn.methods.build import build_objective
from nablagfn.methods.objectives.dag_db import DagDB
from nablagfn.methods.objectives.ddpo import DDPO, PromptStatistics
from nablagfn.methods.objectives.draft import TruncatedBackpropagation
from nablagfn.methods.objectives.draft_lv import DraftLV
from nablagfn.methods.objectives.refl import ReFL
from nablagfn.methods.parts import Parts
from nablagfn.methods.registry import METHODS
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.prompts import PromptSet
from nablagfn.training.trainer import Trainer
from tests.tables import discrete_table, table_of
from tests.tiny_pipeline import make_pipeline
from tests.worlds import FlowWorld, MixtureWorld, PromptedWorld, randomise, sd_alphas_cumprod, tilt

pytestmark = pytest.mark.usefixtures("no_report")

N = 5
BETA = 3.0
PROMPTS = ("a", "bb", "a", "cccc", "bb", "dddddd")


@dataclass
class Problem:
    """A world off its start, the paths drawn from it, and the noise that drove them."""

    world: MixtureWorld
    table: KernelTable
    noise: Tensor
    paths: Trajectories

    @property
    def log_reward(self) -> LogReward:
        return LogReward(self.world, tilt, BETA)

    def select(self, step: Sequence[int], row: Sequence[int] | None = None) -> Selection:
        rows = torch.arange(len(PROMPTS)) if row is None else torch.tensor(row)
        return Selection(self.paths, rows, torch.tensor(step), torch.arange(len(step)) + 100)

    def batch(self, objective: Objective, chosen: Selection) -> Transitions:
        return chosen.transitions(objective.prepare(chosen))


@pytest.fixture
def problem() -> Problem:
    return problem_of(PromptedWorld(hidden=8))


def problem_of(world: MixtureWorld, eta: float = 1.0) -> Problem:
    """eta = 0: paths without noise, which no pool has."""
    randomise(world.parameters(), 0.3)
    table = table_of(world, N, eta=eta)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(len(PROMPTS), N + 1, 2, generator=generator, dtype=torch.float64)
    drawn = rollout(world, table, noise, world.condition(PROMPTS))
    reward = tilt(drawn.clean, PROMPTS, [{}] * len(PROMPTS))
    pooled = None if table.ode else pooled_of(world, table, drawn, reward)
    return Problem(
        world, table, noise, Trajectories(drawn.x, drawn.output, drawn.condition, reward, pooled)
    )


def pooled_of(
    world: MixtureWorld, table: KernelTable, drawn: Trajectories, reward: Tensor
) -> Pooled:
    """What a pool would know of these paths: some weights, u_# and ∇r carried back."""
    with world.reference(), torch.no_grad():
        ref = [
            world.output(drawn.x[:, k], table.time[k].expand(len(reward)), drawn.condition)
            for k in range(N)
        ]
    weight = torch.linspace(0.2, 1.9, len(reward), dtype=torch.float64)
    raw = LogReward(world, tilt, 1.0)
    end = terminal_gradient(raw, drawn.clean, drawn.condition)
    first = torch.zeros(len(reward), dtype=torch.long)
    carried = returns(world, table, drawn.x, first, drawn.condition, end, adjoint)
    own = torch.zeros(len(reward), dtype=torch.bool)
    return Pooled(
        torch.stack(ref, 1),
        own,
        weight,
        2 - weight,
        torch.linspace(0.5, 1, N),
        gradient=carried.mixed[:, 1:],
    )


def reverse_step(
    world: MixtureWorld, x: Tensor, step: int, condition: Condition
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviation of the DDPM posterior in its textbook form, and x̂."""
    times = [*world.times("ddim", N), 0]
    a, a_next = (world.alphas_cumprod[times[i]] for i in (step, step + 1))
    eps = world.output(x, torch.full((len(x),), times[step]), condition)
    clean = (x - (1 - a).sqrt() * eps) / a.sqrt()
    one_step = a / a_next
    mean = a_next.sqrt() * (1 - one_step) / (1 - a) * clean
    mean = mean + one_step.sqrt() * (1 - a_next) / (1 - a) * x
    return mean, ((1 - a_next) / (1 - a) * (1 - one_step)).sqrt(), clean


def chain(p: Problem, row: int, first: int) -> Tensor:
    """β·r(x_N) of one path walked by hand from its stored x_first, with gradient."""
    where = p.world.condition([PROMPTS[row]])
    x = p.paths.x[row : row + 1, first]
    for step in range(first, N):
        mean, std, _ = reverse_step(p.world, x, step, where)
        x = mean + std * p.noise[row, step + 1]
    return BETA * tilt(x, where.prompts, [{}])[0]


def gradient(value: Tensor, world: MixtureWorld) -> Tensor:
    """Of a scalar with respect to θ, flat."""
    found = torch.autograd.grad(value, world.parameters())
    return torch.cat([g.flatten() for g in found])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# -------------------------------------------------------------------------------- direct methods


def truncated(problem: Problem, steps: int | None) -> TruncatedBackpropagation:
    """DRaFT-K; AlignProp for None."""
    return TruncatedBackpropagation(problem.world, problem.log_reward, problem.table, steps=steps)


@pytest.mark.parametrize("steps", [1, 2, N, N + 3])
def test_draft_k_is_the_gradient_through_the_last_k_steps(problem: Problem, steps: int) -> None:
    objective = TruncatedBackpropagation(
        problem.world, problem.log_reward, problem.table, steps=steps
    )
    first = max(0, N - steps)
    assert objective.choose(N, torch.Generator()).tolist() == [first]
    batch = problem.batch(objective, problem.select([first] * len(PROMPTS)))
    losses = objective.losses(batch)
    by_hand = -torch.stack([chain(problem, row, first) for row in range(len(PROMPTS))])
    close(losses.terms["reward"], by_hand)
    assert problem.paths.reward is not None
    close(losses.total().detach(), -BETA * problem.paths.reward)  # on-policy: the drawn sample
    close(gradient(losses.total().sum(), problem.world), gradient(by_hand.sum(), problem.world))


def test_draft_n_is_the_whole_gradient_of_the_expected_reward(problem: Problem) -> None:
    """By central differences of freshly drawn paths along a random direction of θ."""
    world = problem.world
    objective = TruncatedBackpropagation(world, problem.log_reward, problem.table, steps=N)
    batch = problem.batch(objective, problem.select([0] * len(PROMPTS)))
    analytic = gradient(objective.losses(batch).total().sum(), world)
    start = nn.utils.parameters_to_vector(world.parameters()).detach()
    along = torch.randn(
        start.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )

    def loss(shift: float) -> float:
        nn.utils.vector_to_parameters(start + shift * along, world.parameters())
        drawn = rollout(world, problem.table, problem.noise, world.condition(PROMPTS))
        return -BETA * float(tilt(drawn.clean, PROMPTS, []).sum())

    numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert float(analytic @ along) == pytest.approx(numeric, rel=1e-6)


def test_draft_1_differs_from_draft_n(problem: Problem) -> None:
    grads = []
    for steps in (1, N):
        objective = TruncatedBackpropagation(
            problem.world, problem.log_reward, problem.table, steps=steps
        )
        batch = problem.batch(objective, problem.select([N - steps] * len(PROMPTS)))
        grads.append(gradient(objective.losses(batch).total().sum(), problem.world))
    assert (grads[0] - grads[1]).norm() > 0.1 * grads[1].norm()


MIXED = [3, 0, 4, 1, 0, 2]


def test_alignprop_is_draft_k_at_each_paths_own_k(problem: Problem) -> None:
    objective = truncated(problem, None)
    losses = objective.losses(problem.batch(objective, problem.select(MIXED))).total()
    for row, step in enumerate(MIXED):
        draft = TruncatedBackpropagation(
            problem.world, problem.log_reward, problem.table, steps=N - step
        )
        alone = draft.losses(problem.batch(draft, problem.select([step], [row]))).total()
        close(losses[row : row + 1], alone)
        (ours, theirs) = (
            torch.autograd.grad(value, problem.world.parameters(), retain_graph=True)
            for value in (losses[row], alone[0])
        )
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)


def test_alignprop_draws_every_truncation_alike() -> None:
    objective = TruncatedBackpropagation.__new__(TruncatedBackpropagation)
    objective.steps = None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([objective.choose(N, generator) for _ in range(2000)])
    share = torch.bincount(drawn, minlength=N) / 2000
    assert len(share) == N and float((share - 1 / N).abs().max()) < 0.04


def test_replay_gives_back_the_drawn_samples_from_any_step(problem: Problem) -> None:
    noise = noise_of(problem.paths, problem.table, 0)
    close(noise, problem.noise[:, 1:])
    start = problem.paths.x[torch.arange(len(MIXED)), torch.tensor(MIXED)]
    with torch.no_grad():
        end = replay(
            problem.world,
            problem.table,
            start,
            torch.tensor(MIXED),
            noise,
            problem.paths.condition,
        )
    close(end, problem.paths.clean)


def test_refl_scores_one_prediction_of_a_late_step(problem: Problem) -> None:
    objective = ReFL(problem.world, problem.log_reward, problem.table, share=0.5)
    steps = [3, 2, 4, 2, 3, 4]
    losses = objective.losses(problem.batch(objective, problem.select(steps))).total()
    values = []
    for row, step in enumerate(steps):
        where = problem.world.condition([PROMPTS[row]])
        clean = reverse_step(problem.world, problem.paths.x[row : row + 1, step], step, where)[2]
        values.append(-BETA * tilt(clean, where.prompts, [{}])[0])
    close(losses, torch.stack(values))
    theirs = gradient(torch.stack(values).sum(), problem.world)
    close(gradient(losses.sum(), problem.world), theirs)


@pytest.mark.parametrize(
    ("share", "among"), [(0.25, {37 + i for i in range(13)}), (1e-3, {49}), (1.0, set(range(50)))]
)
def test_refl_draws_among_the_last_share_of_the_steps(share: float, among: set[int]) -> None:
    objective = ReFL(None, None, None, share=share)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    drawn = [objective.choose(50, generator) for _ in range(1000)]
    assert {int(step) for step in drawn} == among
    assert all(step.shape == (1,) for step in drawn)


# -------------------------------------------------------------------------------- DRaFT-LV


def lv_problem(problem: Problem, copies: int) -> tuple[DraftLV, Selection]:
    objective = DraftLV(problem.world, problem.log_reward, problem.table, copies=copies)
    steps = [objective.choose(N, torch.Generator()) for _ in PROMPTS]
    assert all(step.tolist() == [N - 1] * copies for step in steps)
    rows = torch.arange(len(PROMPTS)).repeat_interleave(copies)
    return objective, problem.select(torch.cat(steps).tolist(), rows.tolist())


def test_draft_lv_denoises_noisy_copies_of_the_sample(problem: Problem) -> None:
    objective, chosen = lv_problem(problem, 2)
    batch = problem.batch(objective, chosen)
    losses = objective.losses(batch).total()
    times = problem.world.times("ddim", N)
    kept = problem.world.alphas_cumprod[times[-1]] / problem.world.alphas_cumprod[0]
    values = []
    for i, row in enumerate(chosen.row.tolist()):
        where = problem.world.condition([PROMPTS[row]])
        x = kept.sqrt() * problem.paths.clean[row] + (1 - kept).sqrt() * batch.signals.noise[i]
        clean = reverse_step(problem.world, x[None], N - 1, where)[2]
        values.append(-BETA * tilt(clean, where.prompts, [{}])[0])
    close(losses, torch.stack(values))
    theirs = gradient(torch.stack(values).mean(), problem.world)
    close(gradient(losses.mean(), problem.world), theirs)


def test_draft_lv_noise_is_fresh_and_a_function_of_the_seed(problem: Problem) -> None:
    objective, chosen = lv_problem(problem, 50)
    noise = objective.prepare(chosen).noise
    assert torch.equal(noise, objective.prepare(chosen).noise)
    assert len(noise.unique(dim=0)) == len(noise)
    assert float(noise.mean().abs()) < 0.15 and float(noise.std()) == pytest.approx(1, abs=0.1)
    order = torch.randperm(len(noise), generator=torch.Generator().manual_seed(0))
    assert chosen.seed is not None
    other = Selection(chosen.paths, chosen.row[order], chosen.step[order], chosen.seed[order])
    assert torch.equal(objective.prepare(other).noise, noise[order])


def test_renoising_leads_from_one_level_to_the_other() -> None:
    """x' at level ᾱ' becomes x at level ᾱ: signal √ᾱ, variance 1−ᾱ."""
    table = discrete_table(sd_alphas_cumprod(), [801, 401, 1])
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for step in range(3):
        k = table.at_step(step, zero)
        signal = kernels.renoise(zero + 1, zero, k)
        own = kernels.renoise(zero, zero + 1, k)
        close(signal * k.next.alpha_bar.sqrt(), k.here.alpha_bar.sqrt())
        close(signal**2 * (1 - k.next.alpha_bar) + own**2, 1 - k.here.alpha_bar)


# -------------------------------------------------------------------------------- DDPO


def ddpo(problem: Problem, clip: float = 1e-4, bound: float = 5.0) -> DDPO:
    statistics = PromptStatistics(sorted(set(PROMPTS)), 32, 2)
    objective = DDPO(problem.world, problem.table, statistics, clip=clip, advantage_clip=bound)
    assert problem.paths.reward is not None
    objective.observe(PROMPTS, problem.paths.reward)
    return objective


def log_prob(problem: Problem, row: int, step: int) -> Tensor:
    """log p_θ(x_{k+1}|x_k) in nats, by torch.distributions."""
    x = problem.paths.x[row : row + 1, step]
    mean, std, _ = reverse_step(problem.world, x, step, problem.world.condition([PROMPTS[row]]))
    normal = torch.distributions.Normal(mean, std)
    return normal.log_prob(problem.paths.x[row, step + 1]).sum()


def pairs() -> list[tuple[int, int]]:
    return [(row, step) for row in range(len(PROMPTS)) for step in range(N)]


def all_steps(problem: Problem) -> Selection:
    rows, steps = zip(*pairs(), strict=True)
    return problem.select(steps, rows)


def advantages(problem: Problem) -> Tensor:
    """Two rewards of `a` and of `bb` have statistics of their own, the others the epoch's."""
    assert problem.paths.reward is not None
    reward = problem.paths.reward
    found = []
    for prompt, value in zip(PROMPTS, reward, strict=True):
        own = reward[[p == prompt for p in PROMPTS]]
        basis = own if len(own) >= 2 else reward
        found.append((value - basis.mean()) / (basis.std(unbiased=False) + 1e-6))
    return torch.stack(found)


def test_ddpo_starts_as_reinforce(problem: Problem) -> None:
    objective = ddpo(problem)
    losses = objective.losses(problem.batch(objective, all_steps(problem)))
    expected = advantages(problem)
    close(losses.total().detach(), -expected.repeat_interleave(N))  # the ratio is 1
    reinforce = -sum(expected[row] * log_prob(problem, row, step) for row, step in pairs()) / 2
    assert isinstance(reinforce, Tensor)
    close(gradient(losses.total().sum(), problem.world), gradient(reinforce, problem.world))
    assert not losses.metrics["ratio_clipped"].any()


def test_ddpo_ratio_is_exactly_one_for_the_parameters_that_drew(problem: Problem) -> None:
    x, eps = problem.paths.x, problem.paths.output
    k = problem.table.at_step(2, x[:, 2])
    same = kernels.log_ratio(x[:, 2], x[:, 3], eps[:, 2], eps[:, 2], k)
    assert torch.equal(same, torch.zeros_like(same))


def test_ddpo_clips_the_ratio_on_the_side_that_the_advantage_pushes(problem: Problem) -> None:
    clip = 0.05
    objective = ddpo(problem, clip)
    batch = problem.batch(objective, all_steps(problem))
    old = torch.stack([log_prob(problem, *pair) for pair in pairs()]).detach()
    randomise(problem.world.parameters(), 0.02, seed=5)
    new = torch.stack([log_prob(problem, *pair) for pair in pairs()])
    ratio = ((new - old) / 2).exp()  # mean over the two elements
    a = advantages(problem).repeat_interleave(N)
    stopped = ((a > 0) & (ratio > 1 + clip)) | ((a < 0) & (ratio < 1 - clip))
    outside = (ratio - 1).abs() > clip
    assert stopped.any() and (outside & ~stopped).any() and (~outside).any()
    bounded = -a * (1 + clip * a.sign())
    losses = objective.losses(batch)
    close(losses.total(), torch.where(stopped, bounded, -a * ratio))
    assert torch.equal(losses.metrics["ratio_clipped"].bool(), outside)
    close(
        gradient(losses.total().sum(), problem.world),
        gradient((-a * ratio)[~stopped].sum(), problem.world),
    )


def test_ddpo_bounds_advantages_of_each_path(problem: Problem) -> None:
    chosen = all_steps(problem)
    found = ddpo(problem, bound=0.5).prepare(chosen).advantage
    close(found, advantages(problem).clamp(-0.5, 0.5).repeat_interleave(N))
    assert float(advantages(problem).abs().max()) > 0.5


class SlowStatistics:
    """The same with lists."""

    def __init__(self, size: int, min_count: int) -> None:
        self.kept: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=size))
        self.min_count = min_count
        self.epoch: list[float] = []

    def add(self, prompts: Sequence[str], rewards: list[float]) -> None:
        self.epoch = rewards
        for prompt, reward in zip(prompts, rewards, strict=True):
            self.kept[prompt].append(reward)

    def advantage(self, prompt: str, reward: float) -> float:
        enough = len(self.kept[prompt]) >= self.min_count
        basis = list(self.kept[prompt]) if enough else self.epoch
        mean = sum(basis) / len(basis)
        return (reward - mean) / ((sum((v - mean) ** 2 for v in basis) / len(basis)) ** 0.5 + 1e-6)


def test_ddpo_statistics_are_those_of_a_slow_list(tmp_path: Path) -> None:
    """Nine epochs; after every one the buffers go through a file into a new object."""
    names = ["cat", "dog", "cat", "ant"]  # a prompt that is listed twice counts once
    generator = torch.Generator().manual_seed(0)
    fast, slow = PromptStatistics(names, 5, 3), SlowStatistics(5, 3)
    seen = set()
    for _ in range(9):
        prompts = [names[int(i)] for i in torch.randint(4, (7,), generator=generator)]
        reward = torch.randn(7, generator=generator, dtype=torch.float64) + 2
        fast.add(prompts, reward)
        slow.add(prompts, reward.tolist())
        expected = [slow.advantage(*pair) for pair in zip(prompts, reward.tolist(), strict=True)]
        close(fast.advantage(prompts, reward), torch.tensor(expected, dtype=torch.float64))
        seen |= {len(slow.kept[prompt]) for prompt in prompts}
        save_file(fast.state_dict(), tmp_path / "statistics.safetensors")
        fast = PromptStatistics(names, 5, 3)
        fast.load_state_dict(load_file(tmp_path / "statistics.safetensors"))
    assert {1, 2, 5} <= seen and int(fast.count.max()) > 10


# -------------------------------------------------------------------------------- DAG-DB


class GaussianWorld:
    """N(mean, STD²) in the plane with exact ε; the optimum of a linear reward is in closed form.

    w: [N+1, 2] with log F̃(x_k) = w_k·x + const_k under the discrete sampler itself.
    """

    STD = 0.7
    device = torch.device("cpu")

    def __init__(self, slope: Tensor) -> None:
        self.alphas_cumprod = sd_alphas_cumprod()
        self.times = [1 + 200 * k for k in reversed(range(N))]
        self.table = discrete_table(self.alphas_cumprod, self.times)
        self.mean = torch.tensor([1.0, -0.5], dtype=torch.float64)
        self.on = True
        self.w, self.const = [slope], [torch.zeros((), dtype=torch.float64)]
        zero = torch.zeros(1, 2, dtype=torch.float64)
        for step in reversed(range(N)):
            k = self.table.at_step(step, zero)
            offset = kernels.mean(zero, self._exact(zero, self.times[step]), k)[0]
            factor = kernels.mean(zero + 1, self._exact(zero + 1, self.times[step]), k)[0] - offset
            w, const = self.w[0], self.const[0]
            variance = k.std.flatten()[0] ** 2
            self.w.insert(0, factor * w)
            self.const.insert(0, w @ offset + variance / 2 * w @ w + const)

    def _exact(self, x: Tensor, time: int) -> Tensor:
        a = self.alphas_cumprod[time]
        return (1 - a).sqrt() * (x - a.sqrt() * self.mean) / (a * self.STD**2 + 1 - a)

    def output(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """With the adapter on, the mean of each step is m_# + σ²·w_{k+1}: the optimum."""
        rows = []
        for row, t in zip(x, time.long().tolist(), strict=True):
            step = self.times.index(t)
            shift = self.table.std[step] ** 2 / self.table.c2[step] * self.w[step + 1]
            rows.append(self._exact(row, t) + (shift if self.on else 0))
        return torch.stack(rows)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        self.on = False
        yield
        self.on = True

    def decode(self, x: Tensor) -> Tensor:
        return x


class ExactFlow(nn.Module):
    """s_φ = log F̃ − β·γ·r(x̂), spread over two elements."""

    def __init__(self, world: GaussianWorld, log_reward: LogReward, frozen: bool) -> None:
        super().__init__()
        self.world, self.log_reward, self.frozen = world, log_reward, frozen

    def forward(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        world = self.world
        a = world.alphas_cumprod[timestep.long()][:, None]
        with world.reference() if self.frozen else contextlib.nullcontext():
            clean = (x - (1 - a).sqrt() * world.output(x, timestep, condition)) / a.sqrt()
        known = a[:, 0] * self.log_reward(clean, condition)
        steps = [world.times.index(t) for t in timestep.long().tolist()]
        flow = [world.w[k] @ row + world.const[k] for k, row in zip(steps, x, strict=True)]
        return ((torch.stack(flow) - known) / 2)[:, None].expand(-1, 2)


def linear(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
    return images @ torch.tensor([0.8, -0.3], dtype=images.dtype)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_dag_db_is_zero_at_the_exact_optimum_only(sign: float, frozen: bool) -> None:
    """At any pair of points, as detailed balance says; with the optimum of −r it is not."""
    world = GaussianWorld(sign * BETA * torch.tensor([0.8, -0.3], dtype=torch.float64))
    log_reward = LogReward(world, linear, BETA)  # type: ignore[arg-type]
    flow = ExactFlow(world, log_reward, frozen)
    objective = DagDB(
        world,  # type: ignore[arg-type]
        log_reward,
        world.table,
        "squared",
        flow,
        frozen_guess=frozen,
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, N + 1, 2, generator=generator, dtype=torch.float64)
    where = Condition(("",) * 4, ({},) * 4)
    paths = Trajectories(x, torch.zeros(4, N, 2), where, linear(x[:, -1], (), ()))
    row, step = torch.arange(4).repeat_interleave(N), torch.arange(N).repeat(4)
    chosen = Selection(paths, row, step)
    loss = objective.losses(chosen.transitions(objective.prepare(chosen))).total()
    if sign > 0:
        assert float(loss.max()) < 1e-18
    else:
        assert float(loss.reshape(4, N)[:, -1].min()) > 1e-3


@pytest.mark.parametrize("frozen", [False, True])
def test_dag_db_loss_and_gradients_by_hand(problem: Problem, frozen: bool) -> None:
    world = problem.world
    flow = world.make_flow((), 1, 0)
    randomise(list(flow.parameters()), 0.3, seed=4)
    objective = DagDB(world, problem.log_reward, problem.table, "sqrt", flow, frozen_guess=frozen)
    losses = objective.losses(problem.batch(objective, all_steps(problem))).total()
    times = world.times("ddim", N)

    def log_flow(row: int, step: int) -> Tensor:
        x, where = problem.paths.x[row : row + 1, step], world.condition([PROMPTS[row]])
        if step == N:
            return BETA * tilt(x, where.prompts, [{}])[0]
        with torch.no_grad(), world.reference() if frozen else contextlib.nullcontext():
            clean = reverse_step(world, x, step, where)[2]
        known = world.alphas_cumprod[times[step]].sqrt() * BETA * tilt(clean, where.prompts, [])[0]
        return known + flow(x, torch.tensor([times[step]]), where).sum()

    residuals = []
    for row, step in pairs():
        with world.reference():
            prior = log_prob(problem, row, step)
        ratio = log_prob(problem, row, step) - prior
        residuals.append(log_flow(row, step) + ratio - log_flow(row, step + 1))
    by_hand = torch.stack(residuals).square()
    close(losses, by_hand)
    parameters = [*world.parameters(), *flow.parameters()]
    ours = torch.autograd.grad(losses.sum(), parameters)
    theirs = torch.autograd.grad(by_hand.sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
        assert a.any()


# -------------------------------------------------------------------------------- all methods


def method_config(name: str, out: Path, **options: object) -> Config:
    values = {
        "experiment.method": name,
        "model.reward_scale": 2.0,
        "model.timestep_fraction": 0.5,
        "model.flow_channel_width": (8, 16),
        "model.lora_rank": 2,
        "method.draft_steps": 2,
        "method.refl_share": 0.5,
        "method.prompt_min_count": 2,
        "pool.size": 4,
        "pool.images_per_prompt": 2,
        "sampling.num_steps": 3,
        "sampling.batch_size": 4,
        "sampling.num_batches_per_epoch": 1,
        "sampling.guidance_scale": 1.0,
        "training.batch_size": 4,
        "training.gradient_accumulation_steps": 1,
        "training.num_epochs": 2,
        "training.adam_epsilon": 1.0,  # smooth: an update is not the sign of a rounding error
        "training.lr": 0.1,
        "training.max_grad_norm": 1e6,
        "logging.tensorboard": False,
        "logging.sample_freq": 0,
        "evaluation.num_prompts": 0,
        "saving.output_dir": str(out),
        **options,
    }
    config = Config()
    for key, value in values.items():
        set_option(config, key, value)
    return config


def lengths(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
    """Brightness, wanted the more the longer the prompt."""
    return torch.tensor([float(len(p)) for p in prompts]) * images.mean((1, 2, 3))


class Kind:
    """A policy with its reward, made anew for every run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.reward, self.beta = (tilt, 2.0) if name == "world" else (lengths, 1e3)

    def policy(self, method: str) -> Policy:
        if self.name == "world":
            return FlowWorld(hidden=8) if METHODS[method].ode else PromptedWorld(hidden=8)
        return StableDiffusionPolicy(make_pipeline(), lora_rank=2, guidance_scale=1.0)

    def trainer(self, config: Config, reward: Reward | None = None) -> Trainer:
        prompts = PromptSet(("a cat", "a duck", "ants"))
        policy = self.policy(config.experiment.method)
        return Trainer(policy, reward or self.reward, prompts, config, show_progress=False)


KINDS = [Kind("world"), Kind("pipeline")]
EVERYWHERE = [  # the pipeline is no flow model
    pytest.param(method, kind, id=f"{method}-{kind.name}")
    for method in METHODS
    for kind in KINDS
    if kind.name == "world" or not METHODS[method].ode
]
every_method = pytest.mark.parametrize("method", METHODS)


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that was trained, cloned."""
    parts = {**trainer.policy.state_dict(), **trainer.objective.modules.state_dict()}
    return {name: value.detach().clone() for name, value in parts.items()}


@pytest.mark.parametrize(("method", "kind"), EVERYWHERE)
def test_two_updates_are_one_and_one(method: str, kind: Kind, tmp_path: Path) -> None:
    beta = {"model.reward_scale": kind.beta}
    whole = kind.trainer(method_config(method, tmp_path / "whole", **beta))
    start = state(whole)
    assert whole.fit().updates == 2
    end = state(whole)
    assert all(bool(value.isfinite().all()) for value in end.values())
    theta = list(whole.policy.state_dict())
    assert any(not torch.equal(start[name], end[name]) for name in theta)

    half = {"training.num_epochs": 1, **beta}
    kind.trainer(method_config(method, tmp_path / "parts", **half)).fit()
    resumed = kind.trainer(method_config(method, tmp_path / "parts", **beta))
    assert resumed.fit().updates == 2
    again = state(resumed)
    assert [name for name in end if not torch.equal(end[name], again[name])] == []


@every_method
def test_every_row_is_scored_with_its_own_prompt(method: str, problem: Problem) -> None:
    """Paths in another order, transitions in another order: the same loss for each."""
    if METHODS[method].ode:
        problem = problem_of(FlowWorld(hidden=8), eta=0)
    config = method_config(method, Path())
    prompts = PromptSet(tuple(sorted(set(PROMPTS))))
    objective = build_objective(Parts(config, problem.world, tilt, prompts, problem.table))
    assert problem.paths.reward is not None
    objective.observe(PROMPTS, problem.paths.reward)
    steps = objective.choose(N, torch.Generator().manual_seed(0))
    rows = torch.arange(len(PROMPTS)).repeat_interleave(len(steps))
    chosen = problem.select(steps.repeat(len(PROMPTS)).tolist(), rows.tolist())
    losses = objective.losses(problem.batch(objective, chosen)).total()
    order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(3))
    place = order.argsort()[rows]  # where the permuted paths keep each row's path
    moved = Selection(problem.paths[order], place, chosen.step, chosen.seed)
    mix = torch.randperm(len(rows), generator=torch.Generator().manual_seed(4))
    batch = problem.batch(objective, moved)
    close(objective.losses(batch[mix]).total(), losses[mix])


VALUES_ONLY = {"ddpo", "dag-db", "reward-weighted"}


@every_method
def test_only_methods_that_say_so_need_the_gradient_of_the_reward(
    method: str, tmp_path: Path
) -> None:
    def black_box(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        return tilt(images.detach(), prompts, metadata)

    trainer = KINDS[0].trainer(method_config(method, tmp_path), black_box)
    assert trainer.objective.uses_reward_gradient == (method not in VALUES_ONLY)
    if method in VALUES_ONLY:
        assert trainer.fit().finished
    else:
        with pytest.raises(ConfigError, match="no gradient"):
            trainer.fit()


@pytest.mark.parametrize(
    ("key", "value", "method"),
    [
        ("method.draft_steps", 3, "draft-k"),
        ("method.draft_lv_samples", 3, "draft-lv"),
        ("method.refl_share", 1.0, "refl"),
        ("method.clip_range", 0.3, "ddpo"),
        ("method.advantage_clip", 0.3, "ddpo"),
        ("method.prompt_buffer", 3, "ddpo"),
        ("method.prompt_min_count", 20, "ddpo"),
        ("method.guess_model", "pretrained", "dag-db"),
        ("model.reward_adaptive_mode", "sqrt", "dag-db"),
        ("model.timestep_fraction", 1.0, "dag-db"),
        ("model.timestep_fraction", 1.0, "ddpo"),
        ("model.reward_adaptive_mode", "sqrt", "vgg-flow"),
        ("model.timestep_fraction", 1.0, "vgg-flow"),
        ("model.unet_reg_scale", 1.0, "vgg-flow"),
    ],
)
def test_the_settings_of_a_method_reach_it(
    key: str, value: object, method: str, tmp_path: Path
) -> None:
    runs = []
    for name, options in (("plain", {}), ("set", {key: value})):
        trained = {"training.num_inner_epochs": 2, "training.lr": 1.0, **options}
        trainer = KINDS[0].trainer(method_config(method, tmp_path / name, **trained))
        trainer.fit()
        runs.append(trainer.policy.state_dict())
    assert any(not torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_buffer_that_never_fills_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompt_min_count=40"):
        KINDS[0].trainer(method_config("ddpo", tmp_path, **{"method.prompt_min_count": 40}))


NOT_SLOPING = sorted(set(METHODS) - {"nabla-db", "nabla-db-lambda"})
NOT_SWEEPING = sorted(set(METHODS) - {"adjoint-matching", "nabla-db-lambda"})


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        *((name, {"method.clip_quantile": 0.9}, "leave it at 1") for name in NOT_SWEEPING),
        *(
            (name, {"method.mirror": True}, "mirror=True has no use")
            for name in METHODS
            if name != "nabla-db-lambda"
        ),
        *(
            (name, {"method.guess": "no-jacobian"}, "guess=no-jacobian has no")
            for name in NOT_SLOPING
        ),
        (
            "nabla-db-lambda",
            {"method.guess": "shifted", "method.return_lambda": 1.0},
            "no gradient of a guess",
        ),
        ("nabla-db-lambda", {"method.clip_quantile": 0.9}, "leave it at 1"),
        ("nabla-db-lambda", {"method.mirror": True, "method.window": 2}, "window=0"),
        ("nabla-db-lambda", {"method.mirror": True, "method.return_lambda": 0.5}, "lambda=0"),
        (
            "nabla-db-lambda",
            {"method.mirror": True, "training.source": "pool", "model.unet_reg_scale": 0},
            "source=paths",
        ),
    ],
)
def test_options_of_other_ways_to_estimate_are_refused(
    method: str, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        KINDS[0].trainer(method_config(method, tmp_path, **options))
    assert not list(tmp_path.iterdir())


COSTS = {  # model and decode evaluations per path of docs/methods.md, by N = n, K and copies
    ("nabla-db", ""): lambda n, k, c: (7 * n - 2, 2 * n),
    ("nabla-db", "model.no_flow=1"): lambda n, k, c: (5 * n - 2, n),
    ("nabla-db", "model.reverse_loss_scale=0"): lambda n, k, c: (5 * n - 2, n),
    # without the guess's backward pass, n − 1 fewer: at x_N there is none
    ("nabla-db", "method.guess=no-jacobian"): lambda n, k, c: (6 * n - 1, 2 * n),
    ("nabla-db", "method.guess=shifted"): lambda n, k, c: (8 * n - 2, 2 * n),  # n at x_k, too
    ("nabla-db", "method.guess=no-jacobian model.no_flow=1"): lambda n, k, c: (4 * n - 1, n),
    ("nabla-db-lambda", ""): lambda n, k, c: (6 * n - 2, 2 * n),
    ("nabla-db-lambda", "method.guess=no-jacobian"): lambda n, k, c: (5 * n - 1, 2 * n),
    ("nabla-db-lambda", "method.guess=shifted"): lambda n, k, c: (7 * n - 2, 2 * n),
    ("nabla-db-lambda", "method.guess=no-jacobian model.no_flow=1"): lambda n, k, c: (4 * n - 1, n),
    ("nabla-db-lambda", "method.mirror=1"): lambda n, k, c: (8 * n - 4, 3 * n),
    ("nabla-db-lambda", "method.return_lambda=0.5"): lambda n, k, c: (5 * n - 1, n + 1),
    ("nabla-db-lambda", "method.guess=no-jacobian method.return_lambda=0.5"): lambda n, k, c: (
        4 * n,
        n + 1,
    ),
    ("nabla-db-lambda", "method.return_lambda=1"): lambda n, k, c: (4 * n - 1, 1),
    ("nabla-db-pool", ""): lambda n, k, c: (4 * n - 1, 1),  # 2n − 1 of it back along the pool
    ("reward-weighted", "pool.renoise=0"): lambda n, k, c: (2 * n, 1),
    ("adjoint-matching", ""): lambda n, k, c: (4 * n - 1, 1),
    ("terminal-gradient", ""): lambda n, k, c: (3 * n, 1),
    ("refl", ""): lambda n, k, c: (2, 1),
    ("draft-k", ""): lambda n, k, c: (2 * k, 1),
    ("draft-lv", ""): lambda n, k, c: (2 * c, c),
    ("ddpo", ""): lambda n, k, c: (2 * n, 0),
    ("dag-db", ""): lambda n, k, c: (4 * n - 1, 2 * n - 1),
    ("vgg-flow", ""): lambda n, k, c: (6 * n, 2 * n),
    ("vgg-flow", "model.no_flow=1"): lambda n, k, c: (3 * n, n),
}


def test_the_cost_of_every_method_is_known() -> None:
    assert {method for method, _ in COSTS} == set(METHODS) - {"alignprop"}  # its K is random


@pytest.mark.parametrize(("method", "option"), COSTS)
def test_costs_are_those_of_the_documents(method: str, option: str, tmp_path: Path) -> None:
    given = [pair.partition("=") for pair in option.split()]
    options = {
        "sampling.num_steps": 7,
        "model.timestep_fraction": 1.0,
        "training.num_epochs": 1,
        "method.draft_steps": 4,
        "method.draft_lv_samples": 3,
        **{key: value for key, _, value in given},
    }
    trainer = KINDS[0].trainer(method_config(method, tmp_path, **options))
    trainer.fit()
    (row,) = trainer.folder.metrics()
    found = (row["model_evals"] / 4 - 7, row["decode_evals"] / 4)  # without drawing the paths
    assert found == COSTS[method, option](7, 4, 3)


RIVALS = ("refl", "draft-k", "draft-lv", "alignprop", "ddpo", "dag-db", "vgg-flow")


@pytest.mark.parametrize("method", RIVALS)
def test_what_a_rival_logs_is_explained(method: str, tmp_path: Path) -> None:
    trainer = KINDS[0].trainer(method_config(method, tmp_path, **{"training.num_epochs": 1}))
    trainer.fit()
    docs = Path(__file__).parent.parent / "docs"
    text = "".join((docs / name).read_text("utf-8") for name in ("metrics.md", "methods.md"))
    (row,) = trainer.folder.metrics()
    assert [key for key in row if f"`{key}`" not in text] == []


def test_every_transition_has_a_seed_of_its_own(tmp_path: Path) -> None:
    def seeds() -> list[int]:
        found = []
        for epoch in range(2):
            drawn = trainer.collector.collect(epoch)
            (chosen,) = trainer.collector.batches(drawn, epoch, 0, trainer.objective)
            assert chosen.seed is not None and len(chosen.seed) == len(chosen.step) == 8
            found += chosen.seed.tolist()
        return found

    trainer = KINDS[0].trainer(method_config("draft-lv", tmp_path))
    first = seeds()
    assert first == seeds() and len(set(first)) == 16
