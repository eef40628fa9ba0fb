"""Stable Diffusion 1.x, 2.x and the like: a U-Net, one text encoder, discrete levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from torch import Tensor

from ..config import ConfigError
from ..core.schedules import DiscreteNoising, Noising, Prediction
from .latent import LatentPolicy, quiet
from .locate import locate
from .lora import UNET

EMBEDS = "prompt_embeds"  # the tensor of a condition, [B, L, D]


def load_pipeline(
    model: str, revision: str = "main", dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """The frozen pipeline by hub name, folder or embedded name. Raises ConfigError if missing."""
    source = locate(model, revision)
    try:
        with quiet():
            pipeline = StableDiffusionPipeline.from_pretrained(
                source,
                revision=revision,
                dtype=dtype,
                safety_checker=None,
                requires_safety_checker=False,
            )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config.pretrained.model={model!r} cannot be loaded ({error}); complete it with "
            f"`hf download {source}`, or give a folder written by save_pretrained"
        ) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class StableDiffusion:
    """A loaded Stable-Diffusion-type pipeline, as a `LatentModel`."""

    family = "stable-diffusion"
    lora_targets: Mapping[str, tuple[str, ...]] = UNET
    encoders: tuple[str, ...] = ("text_encoder",)
    text = EMBEDS

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        self.pipeline = pipeline
        self.network = pipeline.unet
        size = pipeline.unet.config.sample_size
        self.sample_shape: tuple[int, ...] = (pipeline.unet.config.in_channels, size, size)
        self.prediction: Prediction = pipeline.scheduler.config.prediction_type
        self.noising: Noising = DiscreteNoising(pipeline.scheduler.alphas_cumprod.double().cpu())
        self.text_width: int = pipeline.text_encoder.config.hidden_size

    def times(self, grid: str, num_steps: int) -> Sequence[float]:
        """diffusers' own timesteps for this model, kept in 1..T-1: a step at 0 adds no noise.

        grid: "ddim" or "dpm-solver". Raises ConfigError for another.
        """
        last = int(self.noising.noisiest)
        if num_steps > last:
            raise ConfigError(
                f"config.sampling.num_steps={num_steps}: the model has {last} noisy times"
            )
        config = self.pipeline.scheduler.config
        offset = max(1, config.get("steps_offset", 0))
        if grid == "ddim":
            solver = DDIMScheduler.from_config(config, steps_offset=offset)
        elif grid == "dpm-solver":
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

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """diffusers' own names where they exist for all layers, those of attention; else peft's:
        it reads a mixture of both in part."""
        layers = convert_state_dict_to_diffusers(dict(state))
        if any(".lora_A." in name for name in layers):
            layers = dict(state)
        self.pipeline.save_lora_weights(folder, unet_lora_layers=layers)


class StableDiffusionPolicy(LatentPolicy):
    """A Stable-Diffusion-type pipeline with a trainable LoRA on its U-Net.

    Options as those of `LatentPolicy`.
    """

    @property
    def unet(self) -> Any:
        """The U-Net, with its LoRA."""
        return self.network

    def __init__(self, pipeline: StableDiffusionPipeline, **options: Any) -> None:
        super().__init__(StableDiffusion(pipeline), **options)

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
        pipeline = load_pipeline(model, revision, dtype)
        if dtype == torch.float16:
            pipeline.vae.to(torch.float32)  # reward gradients underflow in a float16 decoder
        device = device or PartialState(cpu=not torch.accelerator.is_available()).device
        if shard:  # the U-Net goes there part by part
            for part in (pipeline.vae, pipeline.text_encoder):
                part.to(device)
        else:
            pipeline.to(device)
        return cls(pipeline, name=model, shard=shard, **options)
