"""What every family must hold, on tiny pipelines of random weights: `TINY` has one for each.

A new family gets these checks for free. `make conformance` runs the slower ones, too.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nablagfn.config import Config, ConfigError, set_option
from nablagfn.core import kernels, rng
from nablagfn.core.kernels import KernelTable, kernel_table
from nablagfn.core.rollout import rollout
from nablagfn.core.schedules import schedule_of
from nablagfn.families import FAMILIES
from nablagfn.families.family import guidance_of
from nablagfn.models.latent import LatentPolicy, quiet, set_sampler
from nablagfn.models.latent_model import PIPELINE_GRID, LatentModel, PipelineCall
from tests.tiny_families import TINY, TOKENS, pixels

STEPS, ROWS, W = 5, 2, 3.0
PROMPTS = ["a cat", "big dog"]
FAMILY_NAMES = sorted(TINY)
pytestmark = pytest.mark.parametrize("name", FAMILY_NAMES)


def config_of(name: str, model: Path | str = "unused") -> Config:
    config = Config()
    for key, value in {
        "pretrained.model": str(model),
        "pretrained.family": name,
        "sampling.height": pixels(name),
        "sampling.width": pixels(name),
        "sampling.guidance_scale": W,
        "sampling.num_steps": STEPS,
        "model.lora_rank": 2,
        "training.mixed_precision": "no",
    }.items():
        set_option(config, key, value)
    if LENGTHS[name]:
        config.sampling.max_sequence_length = TOKENS
    return config


def latent_model(name: str) -> type[LatentModel]:
    return FAMILIES[name].of_diffusers.latent_model  # type: ignore[union-attr]


LENGTHS = {name: FAMILIES[name].of_diffusers.lengths for name in FAMILY_NAMES}  # type: ignore[union-attr]
_made: dict[str, Any] = {}


def pipeline_of(name: str) -> Any:
    """The tiny pipeline, made once."""
    if name not in _made:
        with quiet():
            _made[name] = TINY[name]()
    return _made[name]


def policy_of(name: str, **options: Any) -> LatentPolicy:
    call = dataclasses.replace(PipelineCall.of(config_of(name)), **options.pop("call", {}))
    model = latent_model(name)(TINY[name](), call)
    return LatentPolicy(model, **{"lora_rank": 2, **options})


def own_table(policy: LatentPolicy, eta: float = 0.0) -> KernelTable:
    """The steps of the pipeline's own scheduler, to its clean end where η = 0."""
    times = policy.times(PIPELINE_GRID, STEPS)
    noising = policy.noising
    if not noising.whole and eta == 0:
        noising = dataclasses.replace(noising, cleanest=0.0)  # type: ignore[type-var]
    return kernel_table(schedule_of(noising, times), eta, policy.prediction)


def noise_for(policy: LatentPolicy, steps: int = STEPS, rows: int = ROWS) -> Tensor:
    return rng.normal((steps + 1, *policy.sample_shape), range(rows), seed=0, purpose="test")


def move(policy: LatentPolicy, scale: float = 0.3) -> None:
    """A LoRA that has learned something."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def stock_pictures(name: str, pipeline: Any, noise: Tensor, policy: LatentPolicy) -> np.ndarray:
    """What diffusers draws from this noise by its deterministic first-order scheduler."""
    config = config_of(name)
    stock = FAMILIES[name].stock_sampler(config, ())  # type: ignore[misc]
    own = FAMILIES[name].of_diffusers.deterministic  # type: ignore[union-attr]
    if own.scheduler:
        set_sampler(pipeline, own.scheduler, own.options, own.taken)
    found: np.ndarray = pipeline(
        prompt=list(PROMPTS),  # some pipelines write into it
        height=pixels(name),
        width=pixels(name),
        num_inference_steps=STEPS,
        latents=policy.model.to_pipeline(noise),
        output_type="np",
        **guidance_of(stock, config, len(PROMPTS)),
        **own.call,
        **policy.model.asked.length,
    ).images
    return found


def pictures(policy: LatentPolicy, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return policy.decode(x).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def test_every_family_has_a_tiny_pipeline(name: str) -> None:
    known = {key for key, family in FAMILIES.items() if family.pipelines}
    assert set(TINY) == known
    assert FAMILIES[name].pipelines[0] == type(pipeline_of(name)).__name__
    assert FAMILIES[name].lora_targets == latent_model(name).lora_targets
    assert latent_model(name).family == name


def test_at_eta_0_it_draws_the_pictures_of_the_pipeline(name: str) -> None:
    """Its own shift, μ, timesteps, guidance and clean end, to 1e-4 of float32 pictures."""
    policy = policy_of(name)
    table, noise = own_table(policy), noise_for(policy)
    with policy.reference():
        paths = rollout(policy, table, noise, policy.condition(PROMPTS))
    known = stock_pictures(name, TINY[name](), noise[:, 0] * table.start_std, policy)
    found = pictures(policy, paths.clean)
    assert found.std() > 0.01
    assert np.abs(found - known).max() < 1e-4


def test_without_lora_it_is_the_pipeline_bit_for_bit(name: str) -> None:
    plain, policy = TINY[name](), policy_of(name)
    move(policy)
    with policy.reference():
        found = stock_pictures(name, policy.pipeline, noise_for(policy)[:, 0], policy)
    assert np.array_equal(found, stock_pictures(name, plain, noise_for(policy)[:, 0], policy))


def test_the_lora_of_a_run_is_loaded_by_a_fresh_pipeline(name: str, tmp_path: Path) -> None:
    policy, fresh = policy_of(name), TINY[name]()
    noise = noise_for(policy)[:, 0]
    with policy.reference():
        before = stock_pictures(name, policy.pipeline, noise, policy)
    move(policy)
    policy.save(tmp_path)
    fresh.load_lora_weights(tmp_path)
    known = stock_pictures(name, policy.pipeline, noise, policy)
    found = stock_pictures(name, fresh, noise, policy)
    assert np.abs(found - known).max() < 1e-5
    assert np.abs(known - before).max() > 1e-3


@pytest.mark.parametrize("words", [("attention",), ("all",)])
def test_every_target_learns(name: str, words: tuple[str, ...]) -> None:
    """Each layer that should have an adapter has one, and the output depends on it."""
    policy = policy_of(name, lora_targets=words)
    table, noise = own_table(policy), noise_for(policy)
    x, k = noise[:, 0], table.at_step(STEPS // 2, noise[:, 0])
    out = policy.output(x, k.here.time, policy.condition(PROMPTS))
    out.square().sum().backward()
    second = {key: p.grad for key, p in policy.network.named_parameters() if ".lora_B." in key}
    assert len(second) == len(policy._lora_layers())
    still = [key for key, g in second.items() if g is None or not bool(g.abs().max() > 0)]
    assert not still
    if words == ("attention",):
        for end in policy.model.lora_targets["attention"]:
            assert any(f".{end}.lora_B" in key for key in second), end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_means_are_the_sampled_ones(name: str, dtype: torch.dtype) -> None:
    """Whatever the batch or micro-batch, at η = 1."""
    policy = policy_of(name)
    move(policy)
    for module in (policy.network, policy.vae, *policy.encoders().values()):
        frozen = [p for key, p in module.named_parameters() if ".lora_" not in key]
        for parameter in frozen:
            parameter.data = parameter.data.to(dtype)
    times = policy.times("ddim", STEPS)
    table = kernel_table(schedule_of(policy.noising, times), 1.0, policy.prediction)
    noise, where = noise_for(policy), policy.condition(PROMPTS)
    paths = rollout(policy, table, noise, where)
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    for step in range(STEPS):
        x = paths.x[:, step]
        k = table.at_step(step, x)
        known = kernels.mean(x, paths.output[:, step], k)
        size = float(known.abs().max())
        for rows in ([0], [1], [1, 0], [0, 1, 1, 0]):
            index = torch.tensor(rows)
            with torch.no_grad():
                again = policy.output(x[index], k.here.time[index % ROWS], where[index])
            mean = kernels.mean(x[index], again, table.at_step(step, x[index]))
            assert float((mean - known[index]).abs().max()) < bound * size


def test_its_last_step_is_no_larger_than_the_others(name: str) -> None:
    """The clean end of a run is one where every step has a density of reasonable width."""
    policy = policy_of(name)
    for grid in ("ddim", "dpm-solver"):
        times = policy.times(grid, 20)
        table = kernel_table(schedule_of(policy.noising, times), 1.0, policy.prediction)
        assert bool((table.std > 0.005).all()) and table.num_steps == 20


def test_a_picture_s_size_must_come_out(name: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.sampling\.height=17: .* multiples of"):
        policy_of(name, call={"height": 17})
    policy = policy_of(name, call={"height": 2 * pixels(name)})
    where = policy.condition(PROMPTS)
    x = rng.normal(policy.sample_shape, range(2), seed=0, purpose="test")
    time = torch.tensor([policy.times("ddim", 4)[1]] * 2, dtype=torch.float32)
    assert policy.output(x, time, where).shape == x.shape
    assert policy.decode(x).shape[-2:] == (2 * pixels(name), pixels(name))
