"""Stable Diffusion 1.x, 2.x and the like: a U-Net, one text encoder, discrete levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import Tensor

from ..config import ConfigError
from ..core.schedules import DiscreteNoising
from .latent import LatentPolicy
from .latent_model import GRIDS, PIPELINE_GRID, LatentModel, PipelineCall, unet_lora_layers
from .load import load_pipeline, place
from .lora import UNET

EMBEDS = "prompt_embeds"  # the tensor of a condition, [B, L, D]


class DiscreteModel(LatentModel):
    """A U-Net with the whole-numbered times 0..T-1 of a variance-preserving process."""

    lora_targets = UNET

    def __init__(self, pipeline: Any, call: PipelineCall | None = None) -> None:
        super().__init__(pipeline, call)
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):
            raise ConfigError(
                f"config.pretrained.model: its scheduler, a {type(pipeline.scheduler).__name__}, "
                "has no noise levels alphas_cumprod (EDM's preconditioning is not supported): take "
                "a model with a DDIM, DDPM, Euler or DPM-Solver scheduler"
            )
        self.prediction = pipeline.scheduler.config.prediction_type
        self.noising = DiscreteNoising(pipeline.scheduler.alphas_cumprod.double().cpu())

    @staticmethod
    def network_of(pipeline: Any) -> Any:
        return pipeline.unet

    def times(self, grid: str, num_steps: int) -> Sequence[float]:
        """diffusers' own timesteps for this model, kept in 1..T-1: a step at 0 adds no noise."""
        last = int(self.noising.noisiest)
        if num_steps > last:
            raise ConfigError(
                f"config.sampling.num_steps={num_steps}: the model has {last} noisy times"
            )
        config = self.pipeline.scheduler.config
        offset = max(1, config.get("steps_offset", 0))
        if grid in (GRIDS[0], PIPELINE_GRID):
            solver = DDIMScheduler.from_config(config, steps_offset=offset)
        elif grid == GRIDS[1]:
            solver = DPMSolverMultistepScheduler.from_config(
                config,
                steps_offset=offset,
                algorithm_type="sde-dpmsolver++",
                solver_order=1,
                final_sigmas_type="sigma_min",
            )
        else:
            raise ConfigError(
                f"config.sampling.scheduler: a Stable Diffusion model has no time grid '{grid}'; "
                "take ddim or dpm-solver, or a sampler that gives its own times"
            )
        solver.set_timesteps(num_steps)
        times: list[float] = solver.timesteps.clamp(1, int(self.noising.noisiest)).tolist()
        return times

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        self.pipeline.save_lora_weights(folder, unet_lora_layers=unet_lora_layers(state))


class StableDiffusion(DiscreteModel):
    """A loaded Stable-Diffusion-type pipeline."""

    family = "stable-diffusion"
    pipeline_class = StableDiffusionPipeline

    def default_pixels(self) -> tuple[int, int]:
        side = self.network.config.sample_size * self.pixels_per_latent
        return side, side

    @property
    def text_width(self) -> int:
        width: int = self.pipeline.text_encoder.config.hidden_size
        return width

    def encode(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {EMBEDS: embeds}

    def blank(self, rows: int) -> dict[str, Tensor]:
        words = self.pipeline.text_encoder.config
        return {EMBEDS: torch.zeros(rows, words.max_position_embeddings, words.hidden_size)}

    def call(
        self, network: Callable[..., Any], x: Tensor, time: Tensor, given: Mapping[str, Tensor]
    ) -> Tensor:
        found: Tensor = network(x, time.long(), given[EMBEDS], return_dict=False)[0]
        return found


class StableDiffusionPolicy(LatentPolicy):
    """A Stable-Diffusion-type pipeline with a trainable LoRA on its U-Net.

    guidance_scale: w of classifier-free guidance, >= 1. Options as those of `LatentPolicy`.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        *,
        guidance_scale: float = 5.0,
        height: int = 0,
        width: int = 0,
        **options: Any,
    ) -> None:
        call = PipelineCall(height, width, guidance_scale)
        super().__init__(StableDiffusion(pipeline, call), **options)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        revision: str = "main",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        shard: bool = False,
        **options: Any,
    ) -> StableDiffusionPolicy:
        """Load `model` (hub name, folder, or 'tiny-animals'). Raises ConfigError if missing.

        device: by default this process's accelerator, or the CPU where there is none.
        """
        pipeline = load_pipeline(StableDiffusionPipeline, model, revision, dtype)
        place(pipeline, StableDiffusion, dtype, device, shard=shard)
        return cls(pipeline, name=model, shard=shard, **options)
