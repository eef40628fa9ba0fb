"""Sana and SANA-1.5. (Sana Sprint is distilled, and another class of diffusers.)"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from ..config import Config
from ..models.locate import config_in
from ..models.lora import SANA as TARGETS
from .family import StockSampler
from .pipelines import PipelineFamily, flow_stock

OWNER = "Efficient-Large-Model"
OF_512 = tuple(f"{OWNER}/Sana_{size}M_512px_diffusers" for size in (600, 1600))
OF_1024 = (
    f"{OWNER}/Sana_600M_1024px_diffusers",
    f"{OWNER}/Sana_1600M_1024px_diffusers",
    f"{OWNER}/Sana_1600M_1024px_BF16_diffusers",
    f"{OWNER}/SANA1.5_1.6B_1024px_diffusers",
    f"{OWNER}/SANA1.5_4.8B_1024px_diffusers",
)
SIDE = 1024  # pixels that the pipeline draws unless it is told
EXACT = {"use_resolution_binning": False}  # pictures of the size asked for, none resized


def side_of(model: str, revision: str = "main") -> int:
    """Pixels that a model was trained for, by its name or its folder; else the pipeline's own."""
    if model in OF_512:
        return 512
    if model in OF_1024:
        return SIDE
    folder = os.path.expanduser(model)
    known = config_in(folder, "transformer/config.json", revision, cached=True)
    return 32 * int(known.get("sample_size", SIDE // 32))


def stock(config: Config, times: Sequence[float] = ()) -> StockSampler:
    """Raises ConfigError like `flow_stock`."""
    side = side_of(config.pretrained.model, config.pretrained.revision)
    own = {} if side == SIDE else {"height": side, "width": side}
    return replace(flow_stock(config, times), taken={}, call={**own, **EXACT})


SANA = PipelineFamily(
    "sana",
    model="nablagfn.models.sana:Sana",
    pipelines=("SanaPipeline",),
    lora_targets=TARGETS,
    stock=stock,
    deterministic=StockSampler(
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 1},
        call=EXACT,
    ),
    recomputes_vae=False,
    names=(*OF_512, *OF_1024),
).family()
