"""Where the steps lie, and what each weighs in the path KL."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from nablagfn.config import Config, ConfigError, set_option
from nablagfn.core import kernels, rng
from nablagfn.core.grids import distinct, late_start, spaced_times
from nablagfn.core.path_kl import step_kl, step_weights
from nablagfn.core.rollout import rollout
from nablagfn.core.samplers import Sampler
from nablagfn.core.schedules import DiscreteNoising, LinearNoising, output_of
from nablagfn.families.stable_diffusion import FIRST_ORDER_SDE, STABLE_DIFFUSION
from nablagfn.methods.build import build_kernel
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.worlds.world import COSINE, FLOW
from tests.worlds import MixtureWorld, randomise, sd_alphas_cumprod

SD = DiscreteNoising(sd_alphas_cumprod())
SPACINGS = ("trailing", "logsnr", "angle")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [2, 3, 20, 50, 400, 999])
@pytest.mark.parametrize("noising", [SD, COSINE], ids=["sd", "cosine"])
def test_times_fall_strictly_from_the_noisiest_and_stay_noisy(
    spacing: str, num_steps: int, noising: DiscreteNoising
) -> None:
    times = spaced_times(noising, spacing, num_steps)
    assert len(times) == num_steps and times[0] == 999 and times[-1] >= 1
    assert all(a > b for a, b in pairwise(times)) and all(t == round(t) for t in times)


def test_more_steps_than_times_are_one_line() -> None:
    config = Config()
    for spacing in ("leading", *SPACINGS):
        set_option(config, "sampling.spacing", spacing)
        set_option(config, "sampling.num_steps", 1000)
        with pytest.raises(ConfigError, match=r"num_steps=1000") as error:
            build_kernel(config, MixtureWorld())
        assert "\n" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize("num_steps", [5, 20, 30, 500])
def test_trailing_is_that_of_diffusers(num_steps: int) -> None:
    solver = DDIMScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
    solver.set_timesteps(num_steps)
    known = np.clip(solver.timesteps.numpy(), 1, None)
    assert spaced_times(SD, "trailing", num_steps) == known.tolist()


def test_logsnr_and_angle_are_equal_steps_where_times_are_dense() -> None:
    """20 of 1,000 times: to the nearest one, away from the clean end."""
    for spacing, of in (
        ("logsnr", lambda a, s: (a / s).log()),
        ("angle", lambda a, s: torch.atan2(s, a)),
    ):
        levels = SD.levels(torch.tensor(spaced_times(SD, spacing, 20), dtype=torch.float64))
        steps = of(levels.alpha, levels.sigma).diff().abs()[:12]
        assert float(steps.max() / steps.min()) < 1.05
    times = torch.tensor(spaced_times(LinearNoising(0.01, 0.99), "logsnr", 50), dtype=torch.float64)
    steps = ((1 - times) / times).log().diff()
    assert float(steps.max() - steps.min()) < 1e-12


def test_no_signal_has_no_log_snr_but_an_angle() -> None:
    with pytest.raises(ConfigError, match="infinite: take angle"):
        spaced_times(FLOW, "logsnr", 10)
    times = spaced_times(FLOW, "angle", 10)
    assert times[0] == 1.0 and times[-1] > FLOW.cleanest
    assert spaced_times(FLOW, "trailing", 4)[0] == 1.0
    with pytest.raises(ValueError, match="spacing must be one of"):
        spaced_times(FLOW, "karras", 4)


def test_distinct_moves_as_little_as_it_must() -> None:
    assert distinct([9, 5, 2, 1, 1, 1], 1, 9) == [9, 5, 4, 3, 2, 1]
    assert distinct([5, 5, 5], 1, 5) == [5, 4, 3]
    assert distinct([8, 5, 2], 1, 9) == [8, 5, 2]


# -------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_the_weight_of_a_step_is_that_of_its_kl(prediction: str, eta: float) -> None:
    """KL_k = ½·weight·‖Δε‖², whatever the network predicts; the SNR's rise less 1 at η = 1."""
    from nablagfn.core.schedules import Levels, schedule_of

    schedule = schedule_of(SD, spaced_times(SD, "logsnr", 12))
    table = kernels.kernel_table(schedule, eta, prediction)  # type: ignore[arg-type]
    weights = step_weights(table)
    x, eps, other = torch.randn(3, 2, 5, generator=rng.generator(0, "w"), dtype=torch.float64)
    for step in range(12):
        a, s = schedule.alpha[step], schedule.sigma[step]
        outputs = [
            output_of((x - s * e) / a, e, Levels(a, s), prediction)  # type: ignore[arg-type]
            for e in (eps, other)
        ]
        known = step_kl(outputs[0], outputs[1], table.at_step(step, x))
        expected = weights[step] / 2 * (eps - other).square().sum(1)
        torch.testing.assert_close(known, expected, rtol=1e-9, atol=0)
    snr = (schedule.alpha / schedule.sigma).square()
    if eta == 1:
        torch.testing.assert_close(weights, snr[1:] / snr[:-1] - 1, rtol=1e-9, atol=0)


def test_logsnr_evens_out_what_leading_heaps_on_one_step() -> None:
    config, share = Config(), {}
    set_option(config, "sampling.num_steps", 20)
    policy = StableDiffusionPolicy.from_pretrained("tiny-animals")
    for spacing in ("leading", "logsnr"):
        set_option(config, "sampling.spacing", spacing)
        weights = step_weights(build_kernel(config, policy))
        share[spacing] = float(weights.max() / weights.sum())
    assert share["leading"] > 0.7 and share["logsnr"] < 0.08


def test_a_late_start_is_told_of() -> None:
    config, world = Config(), MixtureWorld()
    for steps, late in ((4, True), (50, False)):
        set_option(config, "sampling.num_steps", steps)
        assert bool(late_start(build_kernel(config, world), world.noising)) is late
    set_option(config, "sampling.num_steps", 4)
    set_option(config, "sampling.spacing", "angle")
    assert not late_start(build_kernel(config, world), world.noising)


def test_a_sampler_with_its_own_times_takes_no_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    from nablagfn.core import samplers

    own = Sampler("own", grid=lambda noising, n: [900.0, 500.0, 100.0])
    monkeypatch.setitem(samplers.SAMPLERS, "own", own)
    config = Config()
    set_option(config, "sampling.scheduler", "own")
    assert build_kernel(config, MixtureWorld()).time[:-1].tolist() == [900.0, 500.0, 100.0]
    set_option(config, "sampling.spacing", "angle")
    with pytest.raises(ConfigError, match=r"spacing=angle does not go with"):
        build_kernel(config, MixtureWorld())


# -------------------------------------------------------------------------------- in diffusers


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("scheduler", ["ddpm", "dpm-solver"])
def test_diffusers_draws_the_same_pictures(spacing: str, scheduler: str) -> None:
    """The program of the report, from the noise that its pipeline draws."""
    config = Config()
    for key, value in {
        "sampling.spacing": spacing,
        "sampling.scheduler": scheduler,
        "sampling.num_steps": 7,
        "sampling.guidance_scale": 2.0,
        "pretrained.model": "tiny-animals",
    }.items():
        set_option(config, key, value)
    policy = StableDiffusionPolicy.from_pretrained("tiny-animals", guidance_scale=2.0)
    randomise(policy.parameters(), 0.02)
    table = build_kernel(config, policy)
    drawn = torch.Generator().manual_seed(5)
    noise = torch.stack(
        [torch.randn(1, *policy.sample_shape, generator=drawn) for _ in range(8)], 1
    )
    paths = rollout(policy, table, noise, policy.condition(["a cat"], ()))
    with torch.no_grad():
        own = policy.decode(paths.clean).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    stock = STABLE_DIFFUSION.stock_sampler(config, table.time[:-1].tolist())
    pipeline = policy.pipeline
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, **FIRST_ORDER_SDE
    )
    assert stock.scheduler == "DPMSolverMultistepScheduler" and stock.options == FIRST_ORDER_SDE
    pipeline.set_progress_bar_config(disable=True)
    other = pipeline(
        ["a cat"],
        guidance_scale=2.0,
        num_inference_steps=7,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
        **stock.call,
    ).images[0]
    assert np.abs(own - other).max() < 1e-3


def test_what_no_scheduler_can_is_said() -> None:
    config = Config()
    for key, value in {
        "sampling.spacing": "logsnr",
        "sampling.scheduler": "ddim",
        "sampling.eta": 0.5,
    }.items():
        set_option(config, key, value)
    with pytest.raises(ConfigError, match="use `nablagfn sample`"):
        STABLE_DIFFUSION.stock_sampler(config, (900.0, 100.0))
    set_option(config, "sampling.eta", 1.0)
    with pytest.raises(ConfigError, match="not known here"):
        STABLE_DIFFUSION.stock_sampler(config)
    assert STABLE_DIFFUSION.stock_sampler(config, (900.0, 100.0)).call == {"timesteps": [900, 100]}
    assert math.isclose(config.sampling.eta, 1.0)
