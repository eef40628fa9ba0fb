"""FLUX.1-dev and FLUX.1-schnell."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from ..config import Config
from ..models.locate import config_in
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
    return replace(found, options={**found.options, **UNSHIFTED}) if unshifted(config) else found


def unshifted(config: Config) -> bool:
    """Whether the scheduler has no shift by the picture's size, by its file or the model's name."""
    model, revision = config.pretrained.model, config.pretrained.revision
    if model == SCHNELL:
        return True
    folder = os.path.expanduser(model)
    known = config_in(folder, "scheduler/scheduler_config.json", revision, cached=True)
    return not known.get("use_dynamic_shifting", True)


FLUX = PipelineFamily(
    "flux",
    model="nablagfn.models.flux:Flux",
    pipelines=("FluxPipeline",),
    lora_targets=TARGETS,
    stock=stock,
    most_tokens=512,
    names=(DEV, SCHNELL),
    distilled=frozenset({SCHNELL}),
).family()
