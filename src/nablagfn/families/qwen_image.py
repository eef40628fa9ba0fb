"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..config import Config
from ..models.lora import QWEN_IMAGE as TARGETS
from .family import StockSampler
from .pipelines import PipelineFamily, flow_stock

NEGATIVE = " "  # without a negative prompt the pipeline does not guide


def stock(config: Config, times: Sequence[float] = ()) -> StockSampler:
    """Raises ConfigError like `flow_stock`."""
    guidance = {"true_cfg_scale": config.sampling.guidance_scale, "negative_prompt": NEGATIVE}
    return replace(flow_stock(config, times), guidance=guidance, counts=True)


QWEN_IMAGE = PipelineFamily(
    "qwen-image",
    model="nablagfn.models.qwen_image:QwenImage",
    pipelines=("QwenImagePipeline",),
    lora_targets=TARGETS,
    stock=stock,
    recomputes_vae=False,
    compiles=False,
    most_tokens=1024,
    names=("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"),
).family()
