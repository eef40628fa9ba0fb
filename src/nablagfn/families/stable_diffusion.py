"""Stable Diffusion 1.x, 2.x and the like, and the shipped tiny-animals."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import Config, ConfigError
from ..models.locate import SD15, TINY_ANIMALS
from ..models.lora import UNET
from .family import StockSampler
from .pipelines import UNET_WORD, PipelineFamily

FIRST_ORDER_SDE = {
    "algorithm_type": "sde-dpmsolver++",
    "solver_order": 1,
    "final_sigmas_type": "sigma_min",
}


def unet_stock(config: Config, times: Sequence[float] = ()) -> StockSampler:
    """times: of the run's steps; needed for a grid of ours, which is given to the scheduler.

    Raises ConfigError for a sampler that no scheduler of diffusers is.
    """
    name, eta = config.sampling.scheduler, config.sampling.eta
    if config.sampling.spacing != "leading":
        return _with_times(config, times)
    if name == "dpm-solver":
        return StockSampler("DPMSolverMultistepScheduler", FIRST_ORDER_SDE)
    if name in ("ddim", "ddpm"):
        return StockSampler("DDIMScheduler", call={"eta": eta})
    raise ConfigError(
        f"no scheduler of diffusers draws as config.sampling.scheduler={name!r} does: use "
        "`nablagfn sample`"
    )


def _with_times(config: Config, times: Sequence[float]) -> StockSampler:
    """diffusers' one scheduler that takes times of any spacing, which draws with η = 1."""
    spacing = config.sampling.spacing
    if config.sampling.scheduler == "ddim" and config.sampling.eta != 1:
        raise ConfigError(
            f"no scheduler of diffusers draws with config.sampling.eta={config.sampling.eta:g} on "
            f"config.sampling.spacing={spacing}: use `nablagfn sample`"
        )
    if not times:
        raise ConfigError(f"the times of config.sampling.spacing={spacing} are not known here")
    return StockSampler(
        "DPMSolverMultistepScheduler",
        FIRST_ORDER_SDE,
        call={"timesteps": [round(time) for time in times]},
    )


TURBO = "stabilityai/sd-turbo"

STABLE_DIFFUSION = PipelineFamily(
    "stable-diffusion",
    model="nablagfn.models.stable_diffusion:StableDiffusion",
    pipelines=("StableDiffusionPipeline",),
    lora_targets=UNET,
    stock=unet_stock,
    deterministic=StockSampler("DDIMScheduler"),
    names=(TINY_ANIMALS, *SD15, TURBO),
    distilled=frozenset({TURBO}),
    network=UNET_WORD,
    kohya=True,
    lengths=False,
    loading=", safety_checker=None, requires_safety_checker=False",
).family()
