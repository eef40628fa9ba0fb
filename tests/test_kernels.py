"""Kernels against closed forms, autograd, diffusers' schedulers and a mixture known exactly."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from nablagfn.core import kernels, rng
from nablagfn.core.kernels import KernelTable, Step, kernel_table
from nablagfn.core.rollout import rollout
from nablagfn.core.schedules import (
    DiscreteNoising,
    Levels,
    LinearNoising,
    Prediction,
    Schedule,
    output_of,
    schedule_of,
)
from tests.tables import discrete_table, table_of
from tests.worlds import MEANS, MixtureWorld, sd_alphas_cumprod

ALPHAS = sd_alphas_cumprod()
SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def spaced(num_steps: int) -> list[int]:
    return [1 + (1000 // num_steps) * k for k in reversed(range(num_steps))]


ETAS = {"ddpm and sde-dpm-solver++": 1.0, "ddim-0.5": 0.5}
every_kernel = pytest.mark.parametrize("eta", ETAS.values(), ids=ETAS)


def made(times: list[int], eta: float = 1.0) -> KernelTable:
    return discrete_table(ALPHAS, times, eta)


def all_steps(table: KernelTable, shape: tuple[int, ...] = (3, 4)) -> tuple[Step, list]:
    """One row per step: coefficients, and x, x_next, ε in float64."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3, table.num_steps, *shape, generator=generator, dtype=torch.float64)
    return table.at(torch.arange(table.num_steps), values[0]), list(values)


@every_kernel
def test_score_next_is_the_gradient_of_log_prob(eta: float) -> None:
    k, (x, x_next, eps) = all_steps(made(spaced(50), eta))
    x_next.requires_grad_()
    (gradient,) = torch.autograd.grad(kernels.log_prob(x, x_next, eps, k).sum(), x_next)
    torch.testing.assert_close(
        kernels.score_next(x, x_next, eps, k), gradient, rtol=1e-10, atol=1e-10
    )


@every_kernel
def test_log_prob_is_a_normalised_gaussian(eta: float) -> None:
    k, (x, x_next, eps) = all_steps(made(spaced(20), eta), shape=(5,))
    covariance = torch.diag_embed(k.std.square().expand_as(x))
    known = torch.distributions.MultivariateNormal(k.c1 * x + k.c2 * eps, covariance)
    torch.testing.assert_close(kernels.log_prob(x, x_next, eps, k), known.log_prob(x_next))


def test_ddim_with_eta_one_is_the_ddpm_posterior() -> None:
    """q(x'|x, x0) by Bayes from q(x|x') and q(x'|x0), two Gaussians, precision-weighted."""
    k, (x, _, eps) = all_steps(made(spaced(50)))
    here, there = k.here.alpha_bar, k.next.alpha_bar
    x0 = (x - (1 - here).sqrt() * eps) / here.sqrt()
    ratio = here / there  # x = √ratio·x' + √(1−ratio)·noise
    precision = ratio / (1 - ratio) + 1 / (1 - there)
    pulled = ratio.sqrt() * x / (1 - ratio) + there.sqrt() * x0 / (1 - there)
    torch.testing.assert_close(kernels.mean(x, eps, k), pulled / precision, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(k.std.square(), 1 / precision, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("num_steps", [7, 50])
def test_ddim_is_diffusers_step(num_steps: int, eta: float) -> None:
    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(num_steps)
    steps = scheduler.timesteps.tolist()
    k, (x, noise, eps) = all_steps(made(steps, eta))
    ours = kernels.mean(x, eps, k) + k.std * noise
    for i, t in enumerate(steps):
        theirs = scheduler.step(eps[i], t, x[i], eta=eta, variance_noise=noise[i]).prev_sample
        torch.testing.assert_close(ours[i], theirs.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("num_steps", [7, 20])
def test_sde_dpm_solver_is_diffusers_step(num_steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        **SD, algorithm_type="sde-dpmsolver++", solver_order=1, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(num_steps)
    steps = scheduler.timesteps.tolist()
    k, (x, noise, eps) = all_steps(made(steps))
    ours = kernels.mean(x, eps, k) + k.std * noise
    for i, t in enumerate(steps):
        theirs = scheduler.step(eps[i], t, x[i], variance_noise=noise[i]).prev_sample
        torch.testing.assert_close(ours[i], theirs.double(), rtol=2e-5, atol=2e-5)


def drawn(eta: float, num_steps: int, count: int) -> torch.Tensor:
    world = MixtureWorld()
    table = table_of(world, num_steps, eta=eta)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(count, num_steps + 1, 2, generator=generator, dtype=torch.float64)
    return rollout(world, table, noise, world.condition([""] * count)).clean


@every_kernel
def test_kernels_agree_with_the_exact_mixture_as_steps_grow(eta: float) -> None:
    """250 steps: mode masses, mean and covariance within 4 standard errors of n draws.

    A standard error is √(p(1−p)/n) for a mass and the delta-method one for the moments.
    """
    count, world = 4000, MixtureWorld()
    x = drawn(eta, 250, count)
    mean, covariance = world.moments(float(ALPHAS[0]))
    masses = torch.bincount(world.mode_of(x), minlength=len(MEANS)) / count
    p = world.weights
    assert ((masses - p).abs() < 4 * (p * (1 - p) / count).sqrt()).all()
    assert ((x.mean(0) - mean).abs() < 4 * (covariance.diagonal() / count).sqrt()).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    error = products.std(0) / count**0.5
    assert ((products.mean(0) - covariance).abs() < 4 * error).all()


@every_kernel
def test_more_steps_are_closer_to_the_exact_mixture(eta: float) -> None:
    """The within-mode spread is where few steps show: 4 steps are off by more than 100 steps."""

    def spread_error(num_steps: int) -> float:
        x, world = drawn(eta, num_steps, 1000), MixtureWorld()
        _, covariance = world.moments(float(ALPHAS[0]))
        return float((x.T.cov() - covariance).abs().max())

    assert spread_error(100) < 0.5 * spread_error(4)


@every_kernel
@pytest.mark.parametrize("num_steps", [2, 20, 50, 999])
def test_every_step_has_noise(eta: float, num_steps: int) -> None:
    table = made(spaced(num_steps), eta)
    assert table.num_steps == num_steps
    assert (table.std > 0).all() and table.std.isfinite().all()
    assert table.c1.isfinite().all() and table.c2.isfinite().all()
    assert table.schedule.alpha[-1] == ALPHAS[0].sqrt() and table.time[-1] == 0


def old_ddim(times: list[int], eta: float) -> Tensor:
    """(c1, c2, std) of DDIM(η) by eq. 12 and 16 of Song et al. 2021, [3, N] float64."""
    level = ALPHAS[[*times, 0]]
    a, a_next = level[:-1], level[1:]
    variance = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
    ratio = (a_next / a).sqrt()
    c2 = (1 - a_next - variance).clamp(min=0).sqrt() - ratio * (1 - a).sqrt()
    return torch.stack([ratio, c2, variance.sqrt()])


def old_sde_dpm_solver(times: list[int]) -> Tensor:
    """(c1, c2, std) of first-order SDE-DPM-Solver++ by eq. 18 of Lu et al. 2022, [3, N] float64."""
    level = ALPHAS[[*times, 0]]
    alpha, sigma = level.sqrt(), (1 - level).sqrt()
    h = (alpha / sigma).log().diff()
    toward_clean = alpha[1:] * -torch.expm1(-2 * h)
    c1 = sigma[1:] / sigma[:-1] * (-h).exp() + toward_clean / alpha[:-1]
    c2 = -toward_clean * sigma[:-1] / alpha[:-1]
    return torch.stack([c1, c2, sigma[1:] * (-torch.expm1(-2 * h)).sqrt()])


@pytest.mark.parametrize(("num_steps", "bound"), [(20, 2e-14), (50, 2e-14), (999, 1.3e-13)])
def test_one_formula_is_ddim_and_sde_dpm_solver(num_steps: int, bound: float) -> None:
    """In relative size; rounded to float32, as training uses them, all coefficients are equal."""
    times = spaced(num_steps)
    known = {1.0: [old_ddim(times, 1.0), old_sde_dpm_solver(times)], 0.5: [old_ddim(times, 0.5)]}
    for eta, tables in known.items():
        ours = made(times, eta)
        found = torch.stack([ours.c1, ours.c2, ours.std])
        for table in tables:
            assert ((found - table) / table).abs().max() < bound
            assert torch.equal(found.float(), table.float())


def test_invalid_eta_raises() -> None:
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="eta"):
            made(spaced(10), eta)


def test_invalid_times_raise() -> None:
    for times in ([1, 500], [500, 500, 1], [500, 0], [1000, 500], [500.5, 1]):
        with pytest.raises(ValueError, match="times"):
            made(times)


def test_at_picks_each_row_of_the_table() -> None:
    table = made(spaced(10))
    like = torch.zeros(3, 4, 8, 8)
    k = table.at(torch.tensor([9, 0, 4]), like)
    assert k.c1.shape == (3, 1, 1, 1) and k.c1.dtype == like.dtype
    assert k.last.tolist() == [True, False, False]
    assert k.here.time.tolist() == [1, 901, 501] and k.next.time.tolist() == [0, 801, 401]
    torch.testing.assert_close(k.std.flatten().double(), table.std[[9, 0, 4]])


# ---------------------------------------------------------------------- predictions and schedules

FLOW = LinearNoising(cleanest=0.03)
VP_TIMES = [950, 700, 400, 100, 1]
FLOW_TIMES = [1.0, 0.8, 0.5, 0.2, 0.1]
SCHEDULES = {
    "variance preserving": schedule_of(DiscreteNoising(ALPHAS), VP_TIMES),
    "flow": schedule_of(FLOW, FLOW_TIMES),
    "flow, from below 1": schedule_of(FLOW, FLOW_TIMES[1:]),
}
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample", "flow")


@dataclass(frozen=True)
class Noised:
    """Data, noise and x at each step of a schedule; output: u of each prediction."""

    x_clean: Tensor
    eps: Tensor
    x: Tensor
    levels: Levels

    def output(self, prediction: Prediction) -> Tensor:
        return output_of(self.x_clean, self.eps, self.levels, prediction)


def noised(schedule: Schedule) -> Noised:
    count = len(schedule.time) - 1
    x_clean, eps = torch.randn(2, count, 3, generator=rng.generator(0, "t"), dtype=torch.float64)
    levels = Levels(schedule.alpha[:-1, None], schedule.sigma[:-1, None])
    return Noised(x_clean, eps, levels.alpha * x_clean + levels.sigma * eps, levels)


def able(schedule: Schedule) -> list[Prediction]:
    """The predictions that say something of x̂ at every level."""
    return [p for p in PREDICTIONS if p != "epsilon" or schedule.alpha[0] > 0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_all_predictions_are_one_kernel(name: str) -> None:
    """The same data and noise give the same x̂, mean and Δε whatever the network predicts."""
    schedule = SCHEDULES[name]
    known = noised(schedule)
    for eta in (0.0, 0.5, 1.0):
        for prediction in able(schedule):
            table = kernel_table(schedule, eta, prediction)
            k = table.at(torch.arange(table.num_steps), known.x)
            u = known.output(prediction)
            clean = kernels.predict_clean(known.x, u, k.here)
            torch.testing.assert_close(clean, known.x_clean, rtol=1e-9, atol=1e-9)
            kept = (k.next.sigma.square() - k.std.square()).sqrt()  # of the noise, not drawn anew
            mean = k.next.alpha * known.x_clean + kept * known.eps
            torch.testing.assert_close(kernels.mean(known.x, u, k), mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["variance preserving", "flow, from below 1"])
def test_the_slope_of_eps_is_its_derivative(name: str) -> None:
    """ε = (x − αx̂)/σ moves by eps_slope·Δu."""
    schedule = SCHEDULES[name]
    known = noised(schedule)
    for prediction in PREDICTIONS:
        k = kernel_table(schedule, 1.0, prediction).at(torch.arange(len(known.x)), known.x)
        u = known.output(prediction).requires_grad_()
        eps = (known.x - k.here.alpha * kernels.predict_clean(known.x, u, k.here)) / k.here.sigma
        (slope,) = torch.autograd.grad(eps.sum(), u)
        torch.testing.assert_close(k.eps_slope.expand_as(slope), slope, rtol=1e-12, atol=0)
        if prediction == "epsilon":
            torch.testing.assert_close(eps.detach(), known.eps, rtol=1e-9, atol=1e-9)


def test_without_noise_a_flow_model_takes_eulers_step() -> None:
    """x' = x + (t' − t)·u, to σ = 0, as diffusers' FlowMatchEulerDiscreteScheduler draws."""
    schedule = schedule_of(LinearNoising(), FLOW_TIMES)
    table = kernel_table(schedule, 0.0, "flow")
    k, (x, _, u) = all_steps(table)
    step = (schedule.time.diff()).reshape(-1, 1, 1)
    torch.testing.assert_close(kernels.mean(x, u, k), x + step * u, rtol=1e-13, atol=1e-13)
    stock = FlowMatchEulerDiscreteScheduler()
    stock.set_timesteps(sigmas=FLOW_TIMES)
    for i, t in enumerate(stock.timesteps):
        theirs = stock.step(u[i], t, x[i]).prev_sample
        torch.testing.assert_close(kernels.mean(x, u, k)[i], theirs.double(), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_is_refused() -> None:
    to_clean, from_noise = schedule_of(LinearNoising(), FLOW_TIMES), SCHEDULES["flow"]
    with pytest.raises(ValueError, match="no density"):
        kernel_table(to_clean, 0.5, "flow")
    with pytest.raises(ValueError, match="zero signal"):
        kernel_table(from_noise, 1.0, "epsilon")
    with pytest.raises(ValueError, match="prediction_type 'x0'"):
        kernel_table(from_noise, 1.0, "x0")  # type: ignore[arg-type]


def test_the_first_step_from_pure_noise_forgets_it() -> None:
    """At α = 0 x says nothing of the clean sample: on_x = 0, and all noise is drawn anew."""
    table = kernel_table(SCHEDULES["flow"], 1.0, "flow")
    assert table.on_x[0] == 0 and table.start_std == 1.0
    assert table.on_clean[0] == table.schedule.alpha[1] and table.std[0] == table.schedule.sigma[1]


def test_renoising_keeps_the_forward_process() -> None:
    """q(x_k|x_{k+1}) after q(x_{k+1}|x_clean) is q(x_k|x_clean)."""
    for schedule in SCHEDULES.values():
        k = kernel_table(schedule, 1.0, "sample").at(
            torch.arange(len(schedule.time) - 1), torch.zeros(1, 1).double()
        )
        torch.testing.assert_close(k.back_x * k.next.alpha, k.here.alpha)
        variance = (k.back_x * k.next.sigma).square() + k.back_std.square()
        torch.testing.assert_close(variance, k.here.sigma.square())


def test_the_end_of_the_grid_can_be_chosen() -> None:
    own = schedule_of(FLOW, FLOW_TIMES)
    assert own.sigma[-1] == 0.03
    assert schedule_of(FLOW, FLOW_TIMES, final_sigma=0.05).sigma[-1] == 0.05
    discrete = schedule_of(DiscreteNoising(ALPHAS), [900, 500], final_sigma=0.1)
    known = (1 - ALPHAS).sqrt()
    assert discrete.time[-1] == (known - 0.1).abs().argmin() > 0
    with pytest.raises(ValueError, match="above the end"):
        schedule_of(FLOW, FLOW_TIMES, final_sigma=0.3)


def test_the_world_is_exact(exact_world: MixtureWorld) -> None:
    """ε = −√(1−ᾱ)·∇ log p, so that the tests that trust the world may."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 2, generator=generator, dtype=torch.float64).requires_grad_()
    level = ALPHAS[:, None]
    (score,) = torch.autograd.grad(exact_world.log_density(x, level).sum(), x)
    eps = exact_world.output(x.detach(), torch.arange(1000), exact_world.condition([""] * 1000))
    torch.testing.assert_close(eps, -(1 - level).sqrt() * score, rtol=1e-9, atol=1e-9)
