"""Stable Diffusion whose noisiest level has no signal (zero terminal SNR; Lin et al. 2024)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler

from nablagfn.core import rng
from nablagfn.core.kernels import kernel_table
from nablagfn.core.rollout import rollout
from nablagfn.core.schedules import schedule_of
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from tests.tiny_pipeline import make_pipeline

STEPS, ROWS = 4, 2


def silent(prediction: str = "v_prediction") -> Any:
    """A pipeline that starts from noise alone."""
    pipeline = make_pipeline(prediction)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_draws_the_pictures_of_the_pipeline_at_eta_0() -> None:
    policy = StableDiffusionPolicy(silent(), guidance_scale=2.0)
    schedule = schedule_of(policy.noising, policy.times("ddim", STEPS))
    assert float(schedule.alpha[0]) == 0
    table = kernel_table(schedule, 0.0, policy.prediction)
    noise = rng.normal((STEPS + 1, *policy.sample_shape), range(ROWS), seed=0, purpose="test")
    prompts = ["a cat", "a dog"]
    with policy.reference():
        paths = rollout(policy, table, noise, policy.condition(prompts))
        found = policy.decode(paths.clean).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy()
    known = silent()(
        prompts,
        guidance_scale=2.0,
        num_inference_steps=STEPS,
        latents=noise[:, 0],
        output_type="np",
    ).images
    assert np.abs(found - known).max() < 1e-4 and found.std() > 0.01


def test_every_step_is_finite_at_eta_1_and_an_eps_prediction_is_refused() -> None:
    policy = StableDiffusionPolicy(silent(), guidance_scale=1.0)
    table = kernel_table(
        schedule_of(policy.noising, policy.times("ddim", STEPS)), 1.0, policy.prediction
    )
    noise = rng.normal((STEPS + 1, *policy.sample_shape), range(ROWS), seed=0, purpose="test")
    paths = rollout(policy, table, noise, policy.condition(["a cat", "a dog"]))
    assert bool(paths.x.isfinite().all()) and bool((table.std > 0).all())
    other = StableDiffusionPolicy(silent("epsilon"))
    schedule = schedule_of(other.noising, other.times("ddim", STEPS))
    with pytest.raises(ValueError, match="zero signal"):
        kernel_table(schedule, 1.0, other.prediction)
