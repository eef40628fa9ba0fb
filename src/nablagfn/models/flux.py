"""FLUX.1: packed latents, T5 beside a pooled CLIP, and in -dev w of guidance as an input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from .latent_model import FlowModel, packed, unpacked
from .lora import FLUX

EMBEDS, POOLED = "prompt_embeds", "pooled_projections"


class Flux(FlowModel):
    """A loaded FLUX.1 pipeline (Black Forest Labs 2024), which is never called without guidance."""

    family = "flux"
    pipeline_class = FluxPipeline
    lora_targets = FLUX
    encoders = ("text_encoder", "text_encoder_2")
    own_tokens = 512  # of T5
    tells_sigmas = True
    embeds_guidance = True
    patch = 2

    @property
    def distilled(self) -> bool:
        """FLUX.1-schnell, in whatever folder: it is told no w, and has no shift by size."""
        shifts = self.pipeline.scheduler.config.get("use_dynamic_shifting")
        return not (self.network.config.guidance_embeds or shifts)

    def channels(self) -> int:
        return int(self.network.config.in_channels) // 4

    def encode(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=device, **self.asked.length
        )
        return {EMBEDS: embeds, POOLED: pooled}

    def blank(self, rows: int) -> dict[str, Tensor]:
        config = self.network.config
        return {
            EMBEDS: torch.zeros(rows, self.tokens, config.joint_attention_dim),
            POOLED: torch.zeros(rows, config.pooled_projection_dim),
        }

    def to_pipeline(self, x: Tensor) -> Tensor:
        return packed(x)

    def call(
        self, network: Callable[..., Any], x: Tensor, time: Tensor, given: Mapping[str, Tensor]
    ) -> Tensor:
        height, width = x.shape[-2:]
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full_like(time, self.asked.guidance_scale, dtype=torch.float32)
        found: Tensor = network(
            hidden_states=packed(x),
            timestep=(1000 * time).to(x.dtype) / 1000,  # rounded where the pipeline rounds it
            guidance=guidance,
            pooled_projections=given[POOLED],
            encoder_hidden_states=given[EMBEDS],
            txt_ids=torch.zeros(given[EMBEDS].shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=places(height // 2, width // 2, x),
            return_dict=False,
        )[0]
        return unpacked(found, height, width)


def places(height: int, width: int, like: Tensor) -> Tensor:
    """Row and column of each token of a picture, [height·width, 3]; the first number is 0."""
    row = torch.arange(height, device=like.device).repeat_interleave(width)
    column = torch.arange(width, device=like.device).repeat(height)
    return torch.stack([torch.zeros_like(row), row, column], 1).to(like.dtype)
