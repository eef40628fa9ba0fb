"""The package against the witness (tests/witness.py): every loss term and every gradient.

Small random problems in float64. The witness gets each row by itself, as a sample without a batch
axis; the package gets all rows at once. They share the random networks and the reward, nothing
else: kernels, densities, guesses, terms and their detachments are computed twice.
"""

from __future__ import annotations

import ast
import copy
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nablagfn.core.kernels import KernelTable
from nablagfn.core.log_reward import LogReward
from nablagfn.core.schedules import DiscreteNoising
from nablagfn.core.types import Condition, Losses, Transitions
from nablagfn.methods.estimators.guess import Guess
from nablagfn.methods.estimators.residual_db import ResidualDB
from nablagfn.methods.objectives.matching import MatchingObjective
from tests import witness
from tests.tables import discrete_table
from tests.worlds import MixtureWorld, randomise, tilt

SHAPES = [(1,), (5,), (2, 3), (1, 2, 2), (3, 2, 2), (2, 1, 3)]
LEVELS = 100  # of the random noise schedules
SEEDS = range(24)
NAMES = ("forward", "reverse", "terminal", "trust")

# The witness subtracts two scores (x_{k+1} − m)/σ², where the package cancels x_{k+1} by hand. The
# residual (c2/σ²)(ε_θ − ε_#) is then left with an error of u·|x|/σ², that is u·|x|/|c2·Δε| of its
# own size, u = 1.1e-16. |c2| is 1e-3 or more in these problems and Δε of order 1: up to 1e-13 an
# element, doubled by the square, times some tens of roundings in the networks. 1,000 problems
# (seeds 0–249, both worlds, with and without flow) stay below 2e-12.
RTOL = 1e-11


class Field(nn.Module):
    """A random smooth vector field of (x, noise level, prompt): none of its Jacobians symmetric."""

    def __init__(self, shape: tuple[int, ...], levels: Tensor, seed: int) -> None:
        super().__init__()
        size = torch.Size(shape).numel()
        self.levels = levels
        self.net = nn.Sequential(nn.Linear(size + 3, 6), nn.Tanh(), nn.Linear(6, size)).double()
        randomise(list(self.net.parameters()), 0.5, seed)

    def one(self, x: Tensor, time: int, prompt: str) -> Tensor:
        """One sample: x [...] → [...]."""
        level = float(self.levels[time])
        about = torch.tensor([level**0.5, (1 - level) ** 0.5, len(prompt) / 5]).double()
        return self.net(torch.cat([x.flatten(), about])).reshape(x.shape)

    def forward(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Many: x [M, ...] → [M, ...]."""
        rows = zip(x, timestep.long().tolist(), condition.prompts, strict=True)
        return torch.stack([self.one(*row) for row in rows])


class FieldPolicy(MixtureWorld):
    """A policy of samples of any shape: a frozen field plus an adapter, and a bent decoder."""

    def __init__(self, shape: tuple[int, ...], levels: Tensor, seed: int) -> None:
        super().__init__()
        self.sample_shape = shape
        self.alphas_cumprod = levels
        self.noising = DiscreteNoising(levels)
        self.frozen, self.adapter = (Field(shape, levels, 10 * seed + i) for i in (0, 1))

    def output(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        eps = self.frozen(x, time, condition)
        return eps + 0.3 * self.adapter(x, time, condition) if self.adapter_on else eps

    def decode(self, x: Tensor) -> Tensor:
        return bend(x)


def bend(x: Tensor) -> Tensor:
    """Latents [...] to pictures of the same shape."""
    return 0.5 + 0.4 * x + 0.1 * x * x


def liking(image: Tensor, prompt: str) -> Tensor:
    """One picture [...] and its prompt to a scalar."""
    pixels = image.flatten()
    slope = torch.linspace(-1, len(prompt), len(pixels), dtype=image.dtype)
    return (slope * pixels).sum() + (len(prompt) * pixels).sin().mean()


def likings(images: Tensor, prompts: Sequence[str], metadata: Sequence) -> Tensor:
    """[M, ...] → [M]."""
    return torch.stack([liking(*row) for row in zip(images, prompts, strict=True)])


@dataclass(frozen=True)
class Problem:
    """The same problem twice: for the witness (setting, steps) and for the package (the rest)."""

    setting: witness.Setting
    steps: list[witness.Transition]
    objective: MatchingObjective
    batch: Transitions
    theta: list[nn.Parameter]
    phi: list[nn.Parameter]


def draw_levels(seed: int) -> Tensor:
    """A random noise schedule, [LEVELS] float64, from nearly clean to nearly noise."""
    uniform = torch.rand(LEVELS, generator=generator(seed), dtype=torch.float64)
    return (1 - 0.01 - 0.07 * uniform).cumprod(0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_scales(seed: int) -> dict[str, float]:
    """β, γ, s, w_B, λ; both γ modes, and s = 1 (its own path in the package) as often as not."""
    dice = random.Random(seed)
    return {
        "beta": dice.uniform(0.5, 4),
        "gamma_power": (1.0, 0.5)[seed // 2 % 2],
        "strength": 1.0 if seed // 4 % 2 else dice.uniform(0, 1.5),
        "reverse_scale": dice.uniform(0.2, 3),
        "trust_scale": dice.uniform(0.2, 3),
    }


def draw_steps(
    seed: int, times: list[int], levels: Tensor, setting: witness.Setting, shape: tuple[int, ...]
) -> list[tuple[int, witness.Transition]]:
    """Five transitions with their index: the first, the last, and three at random; the last two
    of the five prompts are those of the first two."""
    dice, noise = random.Random(seed), generator(seed)
    rows = []
    path = [*times, 0]
    last = len(times) - 1
    for k, prompt in zip(
        [last, 0, *dice.choices(range(len(times)), k=3)],
        ("ab", "c", "defg", "ab", "c"),
        strict=True,
    ):
        here, there = (float(levels[t]) for t in path[k : k + 2])
        x = torch.randn(shape, generator=noise, dtype=torch.float64)
        fresh = torch.randn(shape, generator=noise, dtype=torch.float64)
        mean, std = setting.kernel(x, setting.eps_old(x, path[k], prompt).detach(), here, there)
        step = witness.Transition(
            x, mean + std * fresh, path[k], path[k + 1], here, there, k == last, prompt
        )
        rows.append((k, step))
    return rows


def choose_kernel(
    seed: int, levels: Tensor, times: list[int]
) -> tuple[witness.Kernel, KernelTable]:
    """The same sampler in both languages: even seeds DDIM(η), odd ones SDE-DPM-Solver++."""
    if seed % 2:
        return witness.sde_dpm_kernel, discrete_table(levels, times)
    eta = random.Random(seed).choice((1.0, 0.5, 0.8))
    return witness.ddim_kernel(eta), discrete_table(levels, times, eta)


def unbatched(call: Callable[[Tensor, Tensor, Condition], Tensor]) -> witness.Field:
    """A function of batches as a function of one sample."""

    def field(x: Tensor, time: int, prompt: str) -> Tensor:
        return call(x[None], torch.tensor([time]), Condition((prompt,), ({},)))[0]

    return field


def reference(policy: MixtureWorld) -> witness.Field:
    """ε_# of a policy."""

    def field(x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        with policy.reference():
            return policy.output(x, timestep, condition)

    return unbatched(field)


def draw_models(seed: int, shape: tuple[int, ...] | None, with_flow: bool):
    """(policy, flow, reward for the package, the models for the witness); shape None: the plane."""
    if shape is None:
        policy: MixtureWorld = MixtureWorld(hidden=6, seed=seed)
        randomise(policy.parameters(), 0.3, seed)
        flow = policy.make_flow((8, 8), 1, seed)
        randomise(list(flow.parameters()), 0.3, seed + 1)
        models = {
            "eps_ref": reference(policy),
            "reward": lambda x, prompt: tilt(x[None], (prompt,), ())[0],
        }
    else:
        levels = draw_levels(seed)
        policy = FieldPolicy(shape, levels, seed)
        flow = Field(shape, levels, 10 * seed + 2)
        models = {
            "eps_ref": policy.frozen.one,
            "reward": lambda x, prompt: liking(bend(x), prompt),
        }
    old = copy.deepcopy(policy)
    randomise(old.parameters(), 0.2, seed + 3)
    models["eps_theta"], models["eps_old"] = unbatched(policy.output), unbatched(old.output)
    models["flow"] = unbatched(flow) if with_flow else None
    return policy, flow, tilt if shape is None else likings, models


def draw(seed: int, shape: tuple[int, ...] | None, with_flow: bool = True) -> Problem:
    """A random problem: models, sampler, scales and five transitions."""
    policy, flow, reward, models = draw_models(seed, shape, with_flow)
    levels = policy.alphas_cumprod
    dice = random.Random(seed)
    times = sorted(dice.sample(range(1, len(levels)), dice.randint(2, 8)), reverse=True)
    kernel, table = choose_kernel(seed, levels, times)
    scales = draw_scales(seed)
    setting = witness.Setting(kernel=kernel, **models, **scales)
    rows = draw_steps(seed, times, levels, setting, policy.sample_shape)
    steps = [step for _, step in rows]
    prompts = [step.prompt for step in steps]
    old = [setting.eps_old(step.x, step.time, step.prompt).detach() for step in steps]
    batch = Transitions(
        x=torch.stack([step.x for step in steps]),
        x_next=torch.stack([step.x_next for step in steps]),
        output_old=torch.stack(old),
        step=torch.tensor([k for k, _ in rows]),
        condition=policy.condition(prompts),
    )
    log_reward = LogReward(policy, reward, scales["beta"])
    mode = "squared" if scales["gamma_power"] == 1.0 else "sqrt"
    strength = scales["strength"]
    estimator: ResidualDB | Guess = Guess(policy, log_reward, mode)
    if with_flow:
        estimator = ResidualDB(
            policy,
            log_reward,
            mode,
            flow,
            reverse_scale=scales["reverse_scale"],
            strength=strength,
        )
    objective = MatchingObjective(
        policy, table, estimator, strength=strength, trust=scales["trust_scale"]
    )
    return Problem(setting, steps, objective, batch, policy.parameters(), list(flow.parameters()))


def witnessed(problem: Problem) -> dict[str, Tensor]:
    """The witness's weighted terms by name, each [M], and their `total`."""
    setting = problem.setting
    rows = [witness.terms(setting, step) for step in problem.steps]
    found = {name: torch.stack([getattr(row, name) for row in rows]) for name in NAMES}
    found["reverse"] = setting.reverse_scale * found["reverse"]
    found["trust"] = setting.trust_scale * found["trust"]
    found["total"] = torch.stack([witness.loss(setting, row) for row in rows])
    return found


def packaged(losses: Losses) -> dict[str, Tensor]:
    """The package's terms by name, each [M], and their `total`."""
    return {**losses.terms, "total": losses.total()}


def gradients(problem: Problem, term: Tensor) -> list[Tensor]:
    """Of θ, then φ; each row counts with its own weight, so that no two can stand in for each
    other. A gradient that does not exist is 0."""
    parameters = problem.theta + problem.phi
    if not term.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    weights = torch.linspace(0.5, 2.0, len(term), dtype=term.dtype)
    return list(
        torch.autograd.grad(
            (weights * term).sum(),
            parameters,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest expected element; exact when that is 0."""
    actual, expected = actual.detach(), expected.detach()
    scale, gap = float(expected.abs().max()), float((actual - expected).abs().max())
    return gap / scale if scale else (float("inf") if gap else 0.0)


def disagreement(problem: Problem) -> dict[str, float]:
    """The distance of every term, row by row, and of the gradients of every term."""
    known, found = witnessed(problem), packaged(problem.objective.losses(problem.batch))
    with_flow = problem.setting.flow is not None
    assert set(found) == {*known} - (set() if with_flow else {"reverse", "terminal"})
    gaps = {}
    for name in found:
        rows = zip(found[name], known[name], strict=True)
        gaps[name] = max(distance(one, other) for one, other in rows)
        pairs = zip(gradients(problem, found[name]), gradients(problem, known[name]), strict=True)
        gaps[f"∇ {name}"] = max(distance(one, other) for one, other in pairs)
    return gaps


# -------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("with_flow", [True, False], ids=["residual_db", "no_flow"])
@pytest.mark.parametrize("seed", SEEDS)
def test_agreement(seed: int, with_flow: bool) -> None:
    problem = draw(seed, SHAPES[seed % len(SHAPES)], with_flow)
    gaps = disagreement(problem)
    assert max(gaps.values()) < RTOL, gaps


@pytest.mark.parametrize("with_flow", [True, False], ids=["residual_db", "no_flow"])
@pytest.mark.parametrize("seed", range(8))
def test_agreement_on_the_mixture_of_gaussians(seed: int, with_flow: bool) -> None:
    gaps = disagreement(draw(seed, None, with_flow))
    assert max(gaps.values()) < RTOL, gaps


# -------------------------------------------------------------------------------- not vacuous


def exists(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.abs().max() > 1e-6)


@pytest.mark.parametrize("shape", [(2, 3), None], ids=["fields", "mixture"])
def test_every_term_of_the_witness_is_there_and_trains_what_it_should(
    shape: tuple[int, ...] | None,
) -> None:
    """The reverse and the terminal term reach φ only, the trust region θ only, forward both."""
    problem = draw(1, shape)
    known = witnessed(problem)
    last = torch.tensor([step.last for step in problem.steps])
    assert last.any() and not last.all()
    for name in ("forward", "reverse", "trust"):
        assert (known[name] > 1e-6).all()
    assert (known["terminal"][last] > 1e-6).all() and (known["terminal"][~last] == 0).all()
    reaches = {"forward": (1, 1), "reverse": (0, 1), "terminal": (0, 1), "trust": (1, 0)}
    for name, wanted in reaches.items():
        for parameters, there in zip((problem.theta, problem.phi), wanted, strict=True):
            found = torch.autograd.grad(
                known[name].sum(), parameters, retain_graph=True, allow_unused=True
            )
            assert [g is not None for g in found] == [bool(there)] * len(parameters)
            assert all(exists(g) for g in found) == bool(there)


CHANGES = {
    "beta": {"beta": 1.01},
    "gamma": {"gamma_power": 0.75},
    "strength": {"strength": 0.99},
    "reverse_scale": {"reverse_scale": 1.01},
    "trust_scale": {"trust_scale": 1.01},
    "kernel": {"kernel": witness.ddim_kernel(0.9)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_any_scale_is_seen(change: str) -> None:
    problem = draw(5, (2, 3))
    other = replace(problem, setting=replace(problem.setting, **CHANGES[change]))
    assert max(disagreement(problem).values()) < RTOL
    assert max(disagreement(other).values()) > 1e-4


@pytest.mark.parametrize("change", [{"prompt": "another"}, {"last": True}, {"last": False}])
def test_a_change_of_any_row_is_seen(change: dict) -> None:
    """Only where it is a change: the row's prompt, or whether its end is clean."""
    problem = draw(5, (2, 3))
    for i, step in enumerate(problem.steps):
        steps = list(problem.steps)
        steps[i] = replace(step, **change)
        gap = disagreement(replace(problem, steps=steps))["forward"]
        assert (gap < RTOL) == (steps[i] == step) and (gap < RTOL or gap > 1e-4)


def test_the_witness_s_two_kernels_meet_at_eta_one() -> None:
    """First-order SDE-DPM-Solver++ is DDPM: two independent formulas of the witness agree."""
    x, eps = torch.randn(2, 7, generator=generator(0), dtype=torch.float64)
    for here, there in ((0.1, 0.2), (0.5, 0.9), (0.98, 0.999)):
        one, other = (
            kernel(x, eps, here, there)
            for kernel in (witness.ddim_kernel(1.0), witness.sde_dpm_kernel)
        )
        torch.testing.assert_close(one[0], other[0], rtol=1e-12, atol=1e-13)
        assert one[1] == pytest.approx(other[1], rel=1e-12)


def test_equal_models_have_no_residual() -> None:
    problem = draw(5, (2, 3))
    setting = replace(problem.setting, eps_theta=problem.setting.eps_ref, strength=1.0)
    for step in problem.steps:
        row = witness.terms(setting, step)
        assert row.forward_score.abs().max() < 1e-12 and row.reverse_score.abs().max() < 1e-12


def test_the_witness_knows_nothing_of_the_package() -> None:
    tree = ast.parse(Path(witness.__file__).read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("" if node.level else str(node.module).split(".")[0])
    assert names <= {"torch", *sys.stdlib_module_names}
