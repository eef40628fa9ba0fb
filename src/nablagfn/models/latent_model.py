"""What differs between latent models: a loaded pipeline of diffusers, and how its parts are called.

A model family brings a subclass of `LatentModel`. Its defaults are those of a pipeline with an
`AutoencoderKL` and classifier-free guidance; `FlowModel` adds the straight path of flow matching.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from torch import Tensor

from ..config import Config, ConfigError
from ..core.schedules import LinearNoising, Noising, Prediction
from .flow_shift import FLOW_END, resolution_mu, shift_by_mu, shifted_times

GRIDS = ("ddim", "dpm-solver")  # of samplers (`core.samplers`)
PIPELINE_GRID = "pipeline"  # that of the pipeline's own scheduler, for its deterministic steps


@dataclass(frozen=True)
class PipelineCall:
    """What a run gives to its pipeline beside prompts: pixels, w of guidance, tokens of a prompt.

    0 is the pipeline's own.
    """

    height: int = 0
    width: int = 0
    guidance_scale: float = 1.0
    max_sequence_length: int = 0

    @classmethod
    def of(cls, config: Config) -> PipelineCall:
        """What `config.sampling` asks for."""
        s = config.sampling
        return cls(s.height, s.width, s.guidance_scale, s.max_sequence_length)

    @property
    def length(self) -> dict[str, int]:
        """The argument of encode_prompt, where it is not the pipeline's own."""
        found = self.max_sequence_length
        return {"max_sequence_length": found} if found else {}


class LatentModel(ABC):
    """A loaded pipeline of one family.

    family: its name. lora_targets: endings of the names of the network's layers, by the words of
    model.lora_targets. encoders: the names of the pipeline's text encoders. text: which tensor of a
    condition g_φ attends to. own_tokens: of a prompt in the pipeline's own call, where it takes
    another number. embeds_guidance: the network is told w, and is called once; otherwise guidance
    is classifier-free. patch: the sides of a latent are its multiples. wide_vae: the
    autoencoder overflows in half precision.
    """

    family: ClassVar[str]
    pipeline_class: ClassVar[type]
    lora_targets: ClassVar[Mapping[str, tuple[str, ...]]]
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    text: ClassVar[str] = "prompt_embeds"
    own_tokens: ClassVar[int] = 0
    wide_vae: ClassVar[bool] = False
    embeds_guidance: bool = False
    patch: int = 1
    prediction: Prediction
    noising: Noising

    def __init__(self, pipeline: Any, call: PipelineCall | None = None) -> None:
        self.pipeline = pipeline
        self.asked = call or PipelineCall()
        self.network = self.network_of(pipeline)
        self.vae = pipeline.vae
        height, width = self.latent_size()
        self.sample_shape: tuple[int, ...] = (self.channels(), height, width)

    @staticmethod
    def network_of(pipeline: Any) -> Any:
        """The part that is finetuned."""
        return pipeline.transformer

    def idle_layers(self) -> set[str]:
        """The names of layers on which no output depends, so that a LoRA would learn nothing."""
        return set()

    @property
    def distilled(self) -> bool:
        """Whether the pipeline says of itself that it was distilled to draw in a few steps."""
        return bool(self.pipeline.config.get("is_distilled", False))

    # ---------------------------------------------------------------- sizes

    def channels(self) -> int:
        """C of a latent."""
        return int(self.network.config.in_channels)

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels wide one latent pixel is."""
        return int(self.pipeline.vae_scale_factor)

    def default_pixels(self) -> tuple[int, int]:
        """Height and width of the pipeline's own pictures."""
        side = int(self.pipeline.default_sample_size) * int(self.pipeline.vae_scale_factor)
        return side, side

    @property
    def most_pixels(self) -> int:
        """Of the longest side that it can draw; 0: any."""
        return 0

    def latent_size(self) -> tuple[int, int]:
        """H and W of a latent. Raises ConfigError for pixels that do not come out."""
        height, width = self.default_pixels()
        step = self.pixels_per_latent * self.patch
        found = []
        for key, asked, own in (
            ("height", self.asked.height, height),
            ("width", self.asked.width, width),
        ):
            pixels = asked or own
            if pixels % step:
                raise ConfigError(
                    f"config.sampling.{key}={pixels}: this model draws multiples of {step} pixels"
                )
            if self.most_pixels and pixels > self.most_pixels:
                raise ConfigError(
                    f"config.sampling.{key}={pixels}: this model draws up to {self.most_pixels} "
                    "pixels"
                )
            found.append(pixels // self.pixels_per_latent)
        return found[0], found[1]

    @property
    def text_width(self) -> int:
        """The last size of the tensor that g_φ attends to."""
        return int(self.blank(1)[self.text].shape[-1])

    # ---------------------------------------------------------------- what the network is given

    @property
    def tokens(self) -> int:
        """How many tokens a prompt has, where that can be told."""
        return self.asked.max_sequence_length or self.own_tokens

    @abstractmethod
    def times(self, grid: str, num_steps: int) -> Sequence[float]:
        """The model's times on a grid, as `Policy.times` gives them."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """What the network is given of these prompts, by name, each [len(prompts), ...]."""

    def negative(self, device: torch.device) -> dict[str, Tensor]:
        """What it is given beside them in classifier-free guidance, each [1, ...]."""
        return self.encode([""], device)

    @abstractmethod
    def blank(self, rows: int) -> dict[str, Tensor]:
        """Zeros of the shapes that `encode` gives, for counting."""

    @abstractmethod
    def call(
        self, network: Callable[..., Any], x: Tensor, time: Tensor, given: Mapping[str, Tensor]
    ) -> Tensor:
        """u [M, C, H, W] of `network`, which is this model's or a compiled one of the same form."""

    @property
    def passes(self) -> int:
        """How often the network is called for one guided output: 1 or 2."""
        return 1 if self.embeds_guidance or self.asked.guidance_scale == 1.0 else 2

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Guided u (Ho & Salimans 2022): u_∅ + w(u_c − u_∅), [M, C, H, W]."""
        return unconditional + self.asked.guidance_scale * (conditional - unconditional)

    # ---------------------------------------------------------------- pictures and files

    def decode(self, x: Tensor) -> Tensor:
        """Latents [M, C, H, W] to pictures [M, 3, H', W'], nominally in [-1, 1]."""
        shift = self.vae.config.get("shift_factor")
        latents = x / self.vae.config.scaling_factor + (shift or 0.0)
        images: Tensor = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return images

    def to_pipeline(self, x: Tensor) -> Tensor:
        """Latents [M, C, H, W] in the form in which the pipeline takes `latents`."""
        return x

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write a LoRA's state so that the pipeline's load_lora_weights(folder) reads it."""
        self.pipeline.save_lora_weights(folder, transformer_lora_layers=dict(state))


def vae_dtype(model: type[LatentModel], dtype: torch.dtype) -> torch.dtype:
    """Of the autoencoder beside a network of `dtype`: reward gradients underflow in float16, and
    some overflow in any half precision."""
    return torch.float32 if dtype == torch.float16 or model.wide_vae else dtype


def unet_lora_layers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a U-Net's LoRA by diffusers' own names where they exist for all layers, those of
    attention; else by peft's: it reads a mixture of both in part."""
    layers: dict[str, Tensor] = convert_state_dict_to_diffusers(dict(state))
    return dict(state) if any(".lora_A." in name for name in layers) else layers


class FlowModel(LatentModel):
    """A flow-matching model: x = (1 − σ)x_clean + σ·noise, u = noise − x_clean, time σ in 0..1.

    Its clean end is `FLOW_END` for samplers whose every step has a density. tells_sigmas: its
    pipeline gives even σ and μ to its scheduler, whether that shifts by μ or not. max_shift: μ of
    4,096 tokens where the scheduler does not say.
    """

    tells_sigmas: ClassVar[bool] = False
    max_shift: ClassVar[float] = 1.15
    prediction: Prediction = "flow"
    noising: Noising = LinearNoising(cleanest=FLOW_END)

    def times(self, grid: str, num_steps: int) -> Sequence[float]:
        """σ of the steps: equal ones, shifted as the pipeline's scheduler shifts them, from 1; or
        those of the scheduler itself. Raises ConfigError for a grid that there is none of."""
        if grid == PIPELINE_GRID:
            return self.scheduler_sigmas(num_steps)
        if grid in GRIDS:
            return shifted_times(num_steps, self.shift(num_steps))
        raise ConfigError(
            f"config.sampling.scheduler: a flow model has no time grid '{grid}'; take ddim, ddpm, "
            "dpm-solver or a sampler that gives its own times"
        )

    def mu(self, num_steps: int) -> float | None:
        """μ of a shift that depends on the picture's size; None where it does not."""
        shifts = self.pipeline.scheduler.config.get("use_dynamic_shifting")
        return self.size_mu(num_steps) if shifts else None

    def size_mu(self, num_steps: int) -> float:
        """μ by the number of a picture's tokens."""
        config = self.pipeline.scheduler.config
        _, height, width = self.sample_shape
        return resolution_mu(
            height // self.patch * (width // self.patch),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", self.max_shift),
        )

    def shift(self, num_steps: int) -> float:
        """s of σ ↦ sσ/(1 + (s − 1)σ)."""
        mu = self.mu(num_steps)
        if mu is None:
            return float(self.pipeline.scheduler.config.get("shift", 1.0))
        return shift_by_mu(mu, self.pipeline.scheduler.config.get("time_shift_type", "exponential"))

    def scheduler_options(self, num_steps: int) -> dict[str, Any]:
        """What the pipeline gives to its scheduler's set_timesteps beside the number of steps."""
        if self.tells_sigmas:
            return {"sigmas": even_sigmas(num_steps), "mu": self.size_mu(num_steps)}
        mu = self.mu(num_steps)
        return {} if mu is None else {"mu": mu}

    def scheduler_sigmas(self, num_steps: int) -> list[float]:
        """σ of the pipeline's own steps, without its clean end, σ = 0."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        options = self.scheduler_options(num_steps)
        if "sigmas" in options:
            scheduler.set_timesteps(**options)
        else:
            scheduler.set_timesteps(num_steps, **options)
        found: list[float] = scheduler.sigmas[:-1].double().tolist()
        return found


def even_sigmas(num_steps: int) -> np.ndarray:
    """1, 1 − 1/N, …, 1/N, which several pipelines give to their schedulers."""
    return np.linspace(1.0, 1 / num_steps, num_steps)


def packed(x: Tensor) -> Tensor:
    """Latents [M, C, H, W] as tokens of 2×2 pixels, [M, H/2·W/2, 4C], row by row."""
    rows, channels, height, width = x.shape
    parts = x.reshape(rows, channels, height // 2, 2, width // 2, 2)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`: [M, H/2·W/2, 4C] to [M, C, H, W]."""
    rows, _, channels = tokens.shape
    parts = tokens.reshape(rows, height // 2, width // 2, channels // 4, 2, 2)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels // 4, height, width)
