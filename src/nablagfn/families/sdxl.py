"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..config import Config
from ..models.lora import UNET
from .family import StockSampler
from .pipelines import UNET_WORD, PipelineFamily
from .stable_diffusion import unet_stock

# What DDIMScheduler takes for granted otherwise is another process than the model's own (Euler's).
AS_TRAINED = {"clip_sample": False, "set_alpha_to_one": False}


def stock(config: Config, times: Sequence[float] = ()) -> StockSampler:
    """Raises ConfigError for a sampler that no scheduler of diffusers is."""
    found = unet_stock(config, times)
    if found.scheduler != "DDIMScheduler":
        return found
    return replace(found, options={**found.options, **AS_TRAINED})


TURBO = "stabilityai/sdxl-turbo"

SDXL = PipelineFamily(
    "sdxl",
    model="nablagfn.models.sdxl:StableDiffusionXL",
    pipelines=("StableDiffusionXLPipeline",),
    lora_targets=UNET,
    stock=stock,
    deterministic=StockSampler("DDIMScheduler", AS_TRAINED),
    names=("stabilityai/stable-diffusion-xl-base-1.0", TURBO),
    distilled=frozenset({TURBO}),
    network=UNET_WORD,
    kohya=True,
    lengths=False,
).family()
