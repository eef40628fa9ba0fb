"""Kernels against closed forms, autograd, diffusers' schedulers and a mixture known exactly."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from nablagfn.core import kernels
from nablagfn.core.kernels import KernelTable, Step
from nablagfn.core.rollout import rollout
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


TABLES = {
    "ddpm": lambda steps: kernels.ddim(ALPHAS, steps),
    "ddim-0.5": lambda steps: kernels.ddim(ALPHAS, steps, eta=0.5),
    "sde-dpm-solver": lambda steps: kernels.sde_dpm_solver(ALPHAS, steps),
}
every_kernel = pytest.mark.parametrize("kernel", TABLES)


def all_steps(table: KernelTable, shape: tuple[int, ...] = (3, 4)) -> tuple[Step, list]:
    """One row per step: coefficients, and x, x_next, ε in float64."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3, table.num_steps, *shape, generator=generator, dtype=torch.float64)
    return table.at(torch.arange(table.num_steps), values[0]), list(values)


@every_kernel
def test_score_next_is_the_gradient_of_log_prob(kernel: str) -> None:
    k, (x, x_next, eps) = all_steps(TABLES[kernel](spaced(50)))
    x_next.requires_grad_()
    (gradient,) = torch.autograd.grad(kernels.log_prob(x, x_next, eps, k).sum(), x_next)
    torch.testing.assert_close(
        kernels.score_next(x, x_next, eps, k), gradient, rtol=1e-10, atol=1e-10
    )


@every_kernel
def test_log_prob_is_a_normalised_gaussian(kernel: str) -> None:
    k, (x, x_next, eps) = all_steps(TABLES[kernel](spaced(20)), shape=(5,))
    covariance = torch.diag_embed(k.std.square().expand_as(x))
    known = torch.distributions.MultivariateNormal(k.c1 * x + k.c2 * eps, covariance)
    torch.testing.assert_close(kernels.log_prob(x, x_next, eps, k), known.log_prob(x_next))


def test_ddim_with_eta_one_is_the_ddpm_posterior() -> None:
    """q(x'|x, x0) by Bayes from q(x|x') and q(x'|x0), two Gaussians, precision-weighted."""
    table = kernels.ddim(ALPHAS, spaced(50), eta=1.0)
    k, (x, _, eps) = all_steps(table)
    x0 = (x - (1 - k.alpha_bar).sqrt() * eps) / k.alpha_bar.sqrt()
    ratio = k.alpha_bar / k.alpha_bar_next  # x = √ratio·x' + √(1−ratio)·noise
    precision = ratio / (1 - ratio) + 1 / (1 - k.alpha_bar_next)
    pulled = ratio.sqrt() * x / (1 - ratio) + k.alpha_bar_next.sqrt() * x0 / (1 - k.alpha_bar_next)
    torch.testing.assert_close(kernels.mean(x, eps, k), pulled / precision, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(k.std.square(), 1 / precision, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("num_steps", [7, 50])
def test_ddim_is_diffusers_step(num_steps: int, eta: float) -> None:
    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(num_steps)
    steps = scheduler.timesteps.tolist()
    k, (x, noise, eps) = all_steps(kernels.ddim(ALPHAS, steps, eta))
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
    k, (x, noise, eps) = all_steps(kernels.sde_dpm_solver(ALPHAS, steps))
    ours = kernels.mean(x, eps, k) + k.std * noise
    for i, t in enumerate(steps):
        theirs = scheduler.step(eps[i], t, x[i], variance_noise=noise[i]).prev_sample
        torch.testing.assert_close(ours[i], theirs.double(), rtol=2e-5, atol=2e-5)


def drawn(kernel: str, num_steps: int, count: int) -> torch.Tensor:
    world = MixtureWorld()
    table = TABLES[kernel](world.timesteps(kernel, num_steps))
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(count, num_steps + 1, 2, generator=generator, dtype=torch.float64)
    return rollout(world, table, noise, world.condition([""] * count)).clean


@every_kernel
def test_kernels_agree_with_the_exact_mixture_as_steps_grow(kernel: str) -> None:
    """250 steps: mode masses, mean and covariance within 4 standard errors of n draws.

    A standard error is √(p(1−p)/n) for a mass and the delta-method one for the moments.
    """
    count, world = 4000, MixtureWorld()
    x = drawn(kernel, 250, count)
    mean, covariance = world.moments(float(ALPHAS[0]))
    masses = torch.bincount(world.mode_of(x), minlength=len(MEANS)) / count
    p = world.weights
    assert ((masses - p).abs() < 4 * (p * (1 - p) / count).sqrt()).all()
    assert ((x.mean(0) - mean).abs() < 4 * (covariance.diagonal() / count).sqrt()).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    error = products.std(0) / count**0.5
    assert ((products.mean(0) - covariance).abs() < 4 * error).all()


@every_kernel
def test_more_steps_are_closer_to_the_exact_mixture(kernel: str) -> None:
    """The within-mode spread is where few steps show: 4 steps are off by more than 100 steps."""

    def spread_error(num_steps: int) -> float:
        x, world = drawn(kernel, num_steps, 1000), MixtureWorld()
        _, covariance = world.moments(float(ALPHAS[0]))
        return float((x.T.cov() - covariance).abs().max())

    assert spread_error(100) < 0.5 * spread_error(4)


@every_kernel
@pytest.mark.parametrize("num_steps", [2, 20, 50, 999])
def test_every_step_has_noise(kernel: str, num_steps: int) -> None:
    table = TABLES[kernel](spaced(num_steps))
    assert table.num_steps == num_steps
    assert (table.std > 0).all() and table.std.isfinite().all()
    assert table.c1.isfinite().all() and table.c2.isfinite().all()
    assert table.alpha_bar[-1] == ALPHAS[0] and table.timestep[-1] == 0


@pytest.mark.parametrize("eta", [0.0, -0.1, 1.1, float("nan")])
def test_invalid_eta_raises(eta: float) -> None:
    with pytest.raises(ValueError, match="eta"):
        kernels.ddim(ALPHAS, spaced(10), eta)


@pytest.mark.parametrize("steps", [[1, 500], [500, 500, 1], [500, 0], [1000, 500]])
@pytest.mark.parametrize("build", [kernels.ddim, kernels.sde_dpm_solver])
def test_invalid_timesteps_raise(build, steps: list[int]) -> None:
    with pytest.raises(ValueError, match="timesteps"):
        build(ALPHAS, steps)


def test_at_picks_each_row_of_the_table() -> None:
    table = kernels.ddim(ALPHAS, spaced(10))
    like = torch.zeros(3, 4, 8, 8)
    k = table.at(torch.tensor([9, 0, 4]), like)
    assert k.c1.shape == (3, 1, 1, 1) and k.c1.dtype == like.dtype
    assert k.last.tolist() == [True, False, False]
    assert k.timestep.tolist() == [1, 901, 501] and k.timestep_next.tolist() == [0, 801, 401]
    torch.testing.assert_close(k.std.flatten().double(), table.std[[9, 0, 4]])


def test_the_three_parameterisations_give_the_same_eps() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    level = ALPHAS[[1, 200, 400, 600, 800, 999]][:, None]
    signal, sigma = level.sqrt(), (1 - level).sqrt()
    x = signal * x0 + sigma * eps
    outputs = {"epsilon": eps, "v_prediction": signal * eps - sigma * x0, "sample": x0}
    for kind, output in outputs.items():
        found = kernels.eps_from_model_output(output, x, level, kind)
        torch.testing.assert_close(found, eps, rtol=1e-9, atol=1e-9)


def test_an_unknown_parameterisation_raises() -> None:
    with pytest.raises(ValueError, match="prediction_type 'flow'"):
        kernels.eps_from_model_output(torch.zeros(1), torch.zeros(1), torch.ones(1), "flow")


def test_predict_clean_inverts_the_noising() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1000, 3, generator=generator, dtype=torch.float64)
    level = ALPHAS[:, None]
    x = level.sqrt() * x0 + (1 - level).sqrt() * eps
    torch.testing.assert_close(kernels.predict_clean(x, eps, level), x0, rtol=1e-9, atol=1e-9)


def test_the_world_is_exact(exact_world: MixtureWorld) -> None:
    """ε = −√(1−ᾱ)·∇ log p, so that the tests that trust the world may."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 2, generator=generator, dtype=torch.float64).requires_grad_()
    level = ALPHAS[:, None]
    (score,) = torch.autograd.grad(exact_world.log_density(x, level).sum(), x)
    eps = exact_world.eps(x.detach(), torch.arange(1000), exact_world.condition([""] * 1000))
    torch.testing.assert_close(eps, -(1 - level).sqrt() * score, rtol=1e-9, atol=1e-9)
