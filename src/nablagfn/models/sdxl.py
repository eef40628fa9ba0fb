"""Stable Diffusion XL: a U-Net, two text encoders, pooled embeddings and the picture's sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from .stable_diffusion import EMBEDS, DiscreteModel

POOLED, SIZES = "text_embeds", "time_ids"  # as the U-Net calls them


class StableDiffusionXL(DiscreteModel):
    """A loaded SDXL pipeline (Podell et al. 2023); each picture is whole and uncropped."""

    family = "sdxl"
    pipeline_class = StableDiffusionXLPipeline
    encoders = ("text_encoder", "text_encoder_2")
    wide_vae = True

    def _sizes(self, rows: int) -> Tensor:
        """Original size, crop and target size in pixels, [rows, 6]."""
        side = self.pixels_per_latent
        _, height, width = self.sample_shape
        size = (height * side, width * side)
        return torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).expand(rows, -1)

    def encode(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False
        )
        return {EMBEDS: embeds, POOLED: pooled, SIZES: self._sizes(len(prompts))}

    def negative(self, device: torch.device) -> dict[str, Tensor]:
        """The empty prompt's, or zeros where the pipeline's configuration says so."""
        found = self.encode([""], device)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            for name in (EMBEDS, POOLED):
                found[name] = torch.zeros_like(found[name])
        return found

    def blank(self, rows: int) -> dict[str, Tensor]:
        words = self.pipeline.text_encoder_2.config
        width = self.network.config.cross_attention_dim
        return {
            EMBEDS: torch.zeros(rows, words.max_position_embeddings, width),
            POOLED: torch.zeros(rows, words.projection_dim),
            SIZES: torch.zeros(rows, 6),
        }

    def call(
        self, network: Callable[..., Any], x: Tensor, time: Tensor, given: Mapping[str, Tensor]
    ) -> Tensor:
        found: Tensor = network(
            x,
            time.long(),
            given[EMBEDS],
            added_cond_kwargs={POOLED: given[POOLED], SIZES: given[SIZES]},
            return_dict=False,
        )[0]
        return found

    def decode(self, x: Tensor) -> Tensor:
        """As the pipeline: some autoencoders name their latents' mean and deviation."""
        config = self.vae.config
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return super().decode(x)
        mean, std = (
            x.new_tensor(values).reshape(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        latents = x * std / config.scaling_factor + mean
        images: Tensor = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return images
