"""FLUX.1-dev and FLUX.1-schnell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..config import Config
from ..models.lora import FLUX as TARGETS
from .family import StockSampler
from .pipelines import PipelineFamily, flow_stock

DEV, SCHNELL = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"
UNSHIFTED = {"use_dynamic_shifting": True, "base_shift": 0.0, "max_shift": 0.0}


def stock(config: Config, times: Sequence[float] = ()) -> StockSampler:
    """The pipeline gives its scheduler a shift μ in any case: one of 0 for schnell, which has none.

    Raises ConfigError like `flow_stock`.
    """
    found = flow_stock(config, times)
    if config.pretrained.model != SCHNELL:
        return found
    return replace(found, options={**found.options, **UNSHIFTED})


FLUX = PipelineFamily(
    "flux",
    model="nablagfn.models.flux:Flux",
    pipelines=("FluxPipeline",),
    lora_targets=TARGETS,
    stock=stock,
    names=(DEV, SCHNELL),
    distilled=frozenset({SCHNELL}),
).family()
