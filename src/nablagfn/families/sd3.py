"""Stable Diffusion 3 and 3.5, and the shipped tiny-animals-flow."""

from __future__ import annotations

from ..models.locate import TINY_ANIMALS_FLOW
from ..models.lora import MMDIT
from .pipelines import PipelineFamily, flow_stock

TURBO = "stabilityai/stable-diffusion-3.5-large-turbo"
SD3 = PipelineFamily(
    "sd3",
    model="nablagfn.models.sd3:StableDiffusion3",
    pipelines=("StableDiffusion3Pipeline",),
    lora_targets=MMDIT,
    stock=flow_stock,
    most_tokens=512,
    names=(
        TINY_ANIMALS_FLOW,
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "stabilityai/stable-diffusion-3.5-medium",
        "stabilityai/stable-diffusion-3.5-large",
        TURBO,
    ),
    distilled=frozenset({TURBO}),
    loading=", text_encoder_3=None, tokenizer_3=None",
).family()
