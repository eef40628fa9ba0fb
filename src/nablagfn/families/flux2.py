"""FLUX.2-dev, and FLUX.2 Klein: other pipelines with other guidance, and so two families."""

from __future__ import annotations

from ..models.lora import FLUX2 as TARGETS
from .pipelines import PipelineFamily, flow_stock

KLEIN = "black-forest-labs/FLUX.2-klein"
DISTILLED = frozenset({f"{KLEIN}-4B", f"{KLEIN}-9B"})

FLUX2 = PipelineFamily(
    "flux2",
    model="nablagfn.models.flux2:Flux2",
    pipelines=("Flux2Pipeline",),
    lora_targets=TARGETS,
    stock=flow_stock,
    names=("black-forest-labs/FLUX.2-dev",),
).family()

FLUX2_KLEIN = PipelineFamily(
    "flux2-klein",
    model="nablagfn.models.flux2:Flux2Klein",
    pipelines=("Flux2KleinPipeline",),
    lora_targets=TARGETS,
    stock=flow_stock,
    names=(f"{KLEIN}-base-4B", f"{KLEIN}-base-9B", *sorted(DISTILLED)),
    distilled=DISTILLED,
).family()
