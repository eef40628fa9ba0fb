"""Stable Diffusion XL."""

from __future__ import annotations

from ..models.lora import UNET
from .pipelines import PipelineFamily
from .stable_diffusion import unet_stock

SDXL = PipelineFamily(
    "sdxl",
    model="nablagfn.models.sdxl:StableDiffusionXL",
    pipelines=("StableDiffusionXLPipeline",),
    lora_targets=UNET,
    stock=unet_stock,
    names=("stabilityai/stable-diffusion-xl-base-1.0",),
    kohya=True,
    lengths=False,
).family()
