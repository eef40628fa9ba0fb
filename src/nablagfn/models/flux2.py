"""FLUX.2: latents of 2x2 patches normalised by the autoencoder, prompts read by a language model.

-dev is told w of guidance and reads prompts with Mistral; Klein has classifier-free guidance, or
none where it is distilled, and Qwen3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from .latent_model import FlowModel
from .lora import FLUX2

EMBEDS = "prompt_embeds"


class Flux2(FlowModel):
    """A loaded FLUX.2-dev pipeline (Black Forest Labs 2025).

    A latent has a channel for each of the 2x2 pixels of the autoencoder's: [M, 4C, H/2, W/2].
    """

    family = "flux2"
    pipeline_class = Flux2Pipeline
    lora_targets = FLUX2
    embeds_guidance = True
    own_tokens = 512
    tells_sigmas = True

    @property
    def pixels_per_latent(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)

    def size_mu(self, num_steps: int) -> float:
        """μ by the number of tokens and of steps."""
        _, height, width = self.sample_shape
        return float(compute_empirical_mu(height * width, num_steps))

    def encode(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(list(prompts), device=device, **self.asked.length)
        return {EMBEDS: embeds}

    def blank(self, rows: int) -> dict[str, Tensor]:
        return {EMBEDS: torch.zeros(rows, self.tokens, self.network.config.joint_attention_dim)}

    def call(
        self, network: Callable[..., Any], x: Tensor, time: Tensor, given: Mapping[str, Tensor]
    ) -> Tensor:
        height, width = x.shape[-2:]
        words = given[EMBEDS].shape[1]
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full_like(time, self.asked.guidance_scale, dtype=torch.float32)
        found: Tensor = network(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=(1000 * time).to(x.dtype) / 1000,  # rounded where the pipeline rounds it
            guidance=guidance,
            encoder_hidden_states=given[EMBEDS],
            txt_ids=text_places(words, x.device),
            img_ids=picture_places(height, width, x.device),
            return_dict=False,
        )[0]
        return found.transpose(1, 2).unflatten(2, (height, width))

    def decode(self, x: Tensor) -> Tensor:
        """The latents' own mean and deviation are those that the autoencoder's batch norm kept."""
        norm = self.vae.bn
        mean, variance = (
            kept.to(x.dtype).reshape(1, -1, 1, 1) for kept in (norm.running_mean, norm.running_var)
        )
        latents = unpatched(x * (variance + self.vae.config.batch_norm_eps).sqrt() + mean)
        images: Tensor = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return images


class Flux2Klein(Flux2):
    """A loaded FLUX.2 Klein pipeline: a distilled one is called without guidance, whatever w."""

    family = "flux2-klein"
    pipeline_class = Flux2KleinPipeline

    def __init__(self, pipeline: Any, *call: Any) -> None:
        super().__init__(pipeline, *call)
        self.embeds_guidance = self.distilled


def picture_places(height: int, width: int, device: torch.device) -> Tensor:
    """(0, row, column, 0) of each token of a picture, [height·width, 4]."""
    row = torch.arange(height, device=device).repeat_interleave(width)
    column = torch.arange(width, device=device).repeat(height)
    zero = torch.zeros_like(row)
    return torch.stack([zero, row, column, zero], 1)


def text_places(words: int, device: torch.device) -> Tensor:
    """(0, 0, 0, number) of each token of a prompt, [words, 4]."""
    number = torch.arange(words, device=device)
    zero = torch.zeros_like(number)
    return torch.stack([zero, zero, zero, number], 1)


def unpatched(x: Tensor) -> Tensor:
    """[M, 4C, H, W] to [M, C, 2H, 2W]: four channels are 2x2 pixels, row by row."""
    return torch.nn.functional.pixel_shuffle(x, 2)
