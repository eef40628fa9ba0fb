"""Sana: a linear DiT on the latents of a deep autoencoder, with a Gemma that is told what to do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor

from ..config import ConfigError
from .latent_model import FlowModel
from .lora import SANA

EMBEDS, MASK = "prompt_embeds", "prompt_attention_mask"
SIDE = 32  # the pipeline draws multiples of it
INSTRUCTION = "complex_human_instruction"  # the pipeline's own stands in its call's defaults


class Sana(FlowModel):
    """A loaded Sana or SANA-1.5 pipeline (Xie et al. 2024, 2025).

    Its scheduler tells the network whole thousandths of σ, rounded down, and so does this: what was
    finetuned is asked at the same times by every program. Raises ConfigError for a pipeline with
    another kind of scheduler.
    """

    family = "sana"
    pipeline_class = SanaPipeline
    lora_targets = SANA
    own_tokens = 300

    def __init__(self, pipeline: Any, *call: Any) -> None:
        config = pipeline.scheduler.config
        if not config.get("use_flow_sigmas") or config.get("prediction_type") != "flow_prediction":
            raise ConfigError(
                f"config.pretrained.model: its scheduler, a {type(pipeline.scheduler).__name__}, "
                "is not the one of Sana; give it a DPMSolverMultistepScheduler with "
                "use_flow_sigmas=True, prediction_type='flow_prediction' and flow_shift"
            )
        pixels = int(pipeline.vae_scale_factor)
        self.patch = math.lcm(int(pipeline.transformer.config.patch_size) * pixels, SIDE) // pixels
        super().__init__(pipeline, *call)

    def default_pixels(self) -> tuple[int, int]:
        """Those that the network was trained for."""
        side = int(self.network.config.sample_size) * self.pixels_per_latent
        return side, side

    def mu(self, num_steps: int) -> float | None:
        """The pipeline tells none."""
        return None

    def shift(self, num_steps: int) -> float:
        return float(self.pipeline.scheduler.config.flow_shift)

    def encode(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        return self._encode(prompts, device, instruction_of(self.pipeline))

    def negative(self, device: torch.device) -> dict[str, Tensor]:
        """The empty prompt's, without the instruction that comes before others."""
        return self._encode([""], device, None)

    def _encode(
        self, prompts: Sequence[str], device: torch.device, instruction: list[str] | None
    ) -> dict[str, Tensor]:
        embeds, mask, *_ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=device,
            max_sequence_length=self.tokens,
            complex_human_instruction=instruction,
        )
        return {EMBEDS: embeds, MASK: mask}

    def blank(self, rows: int) -> dict[str, Tensor]:
        return {
            EMBEDS: torch.zeros(rows, self.tokens, self.network.config.caption_channels),
            MASK: torch.ones(rows, self.tokens, dtype=torch.long),
        }

    def call(
        self, network: Callable[..., Any], x: Tensor, time: Tensor, given: Mapping[str, Tensor]
    ) -> Tensor:
        config = self.network.config
        found: Tensor = network(
            x,
            encoder_hidden_states=given[EMBEDS].to(x.dtype),
            encoder_attention_mask=given[MASK],
            timestep=(1000 * time).long() * config.timestep_scale,
            return_dict=False,
        )[0]
        learns_variance = config.out_channels // 2 == config.in_channels
        return found.chunk(2, dim=1)[0] if learns_variance else found


def instruction_of(pipeline: Any) -> list[str]:
    """What the pipeline puts before a prompt unless it is told otherwise."""
    found: list[str] = inspect.signature(type(pipeline).__call__).parameters[INSTRUCTION].default
    return found
