"""Stable Diffusion 3 and 3.5: an MM-DiT, two CLIP encoders, and T5 or zeros in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from .latent_model import FlowModel
from .lora import MMDIT

EMBEDS, POOLED = "prompt_embeds", "pooled_projections"


class StableDiffusion3(FlowModel):
    """A loaded SD3 or SD3.5 pipeline (Esser et al. 2024)."""

    family = "sd3"
    pipeline_class = StableDiffusion3Pipeline
    lora_targets = MMDIT
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    own_tokens = 256  # of T5
    max_shift = 1.16  # as its pipeline has it

    def __init__(self, pipeline: Any, *call: Any) -> None:
        self.patch = pipeline.transformer.config.patch_size
        super().__init__(pipeline, *call)

    @property
    def most_pixels(self) -> int:
        """As many as its table has places."""
        places = int(self.network.config.pos_embed_max_size)
        return places * self.patch * self.pixels_per_latent

    def idle_layers(self) -> set[str]:
        """The last block drops what it makes of the prompt, and so these queries."""
        last = self.network.config.num_layers - 1
        return {f"transformer_blocks.{last}.attn.add_q_proj"}

    def encode(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        asked = list(prompts)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            asked,
            asked,
            asked,
            device=device,
            do_classifier_free_guidance=False,
            **self.asked.length,
        )
        return {EMBEDS: embeds, POOLED: pooled}

    def blank(self, rows: int) -> dict[str, Tensor]:
        config = self.network.config
        words = self.pipeline.text_encoder.config.max_position_embeddings
        return {
            EMBEDS: torch.zeros(rows, words + self.tokens, config.joint_attention_dim),
            POOLED: torch.zeros(rows, config.pooled_projection_dim),
        }

    def call(
        self, network: Callable[..., Any], x: Tensor, time: Tensor, given: Mapping[str, Tensor]
    ) -> Tensor:
        found: Tensor = network(
            hidden_states=x,
            timestep=1000 * time,
            encoder_hidden_states=given[EMBEDS],
            pooled_projections=given[POOLED],
            return_dict=False,
        )[0]
        return found
