"""Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..config import Config
from ..models.lora import Z_IMAGE as TARGETS
from .family import StockSampler
from .pipelines import PipelineFamily, flow_stock

BASE, TURBO = "Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo"


def stock(config: Config, times: Sequence[float] = ()) -> StockSampler:
    """The pipeline adds its guidance_scale times the difference to the conditional output, so that
    0 switches it off. Raises ConfigError like `flow_stock`."""
    guidance = {"guidance_scale": config.sampling.guidance_scale - 1}
    return replace(flow_stock(config, times), guidance=guidance, counts=True)


Z_IMAGE = PipelineFamily(
    "z-image",
    model="nablagfn.models.z_image:ZImage",
    pipelines=("ZImagePipeline",),
    lora_targets=TARGETS,
    stock=stock,
    compiles=False,
    names=(BASE, TURBO),
    distilled=frozenset({TURBO}),
).family()
