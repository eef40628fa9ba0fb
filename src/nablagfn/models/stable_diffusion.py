"""The Stable-Diffusion policy: a LoRA on a frozen pipeline, seen as a guided ε-predictor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState, cpu_offload_with_hook
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ..config import ConfigError
from ..core import rng
from ..core.kernels import eps_from_model_output
from ..core.surrogate import wants_gradient
from ..core.types import Condition, Metadata
from .flow import UNetFlow
from .in_range import Border
from .locate import locate
from .shard import shard as shard_over_processes

ADAPTER = "default"
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence bars and notices of diffusers and transformers (safety checker, unused encoders)."""
    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """In float64 where the device has it (Apple's does not)."""
    return values.float().to(device) if device.type == "mps" else values.to(device)


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


class StableDiffusionPolicy:
    """A Stable-Diffusion-type pipeline with a trainable LoRA on its U-Net.

    guidance_scale: classifier-free guidance of both the finetuned and the frozen model (>= 1).
    lora_rank: rank and alpha. seed: of the LoRA's gaussian initialisation. The LoRA is float32
    whatever the dtype of the frozen weights. vae_slice: pictures decoded at a time (0: all) where
    no gradient is taken. name: hub name or folder, for the run's records. shard: the U-Net's
    frozen weights are spread over the processes (`models.shard`), on the device of the VAE.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        *,
        guidance_scale: float = 5.0,
        lora_rank: int = 8,
        seed: int = 0,
        gradient_checkpointing: bool = False,
        vae_checkpointing: bool = False,
        vae_slice: int = 0,
        name: str = "",
        shard: bool = False,
    ) -> None:
        self.pipeline = pipeline
        self.name = name or str(pipeline.name_or_path or "unnamed")
        self.unet = pipeline.unet
        self.unet_free: Callable[..., Any] | None = None  # where no gradient is taken; None: unet
        self.vae = pipeline.vae
        self.guidance_scale = guidance_scale
        for module in (self.unet, self.vae, pipeline.text_encoder):
            module.requires_grad_(False)
            module.eval()
        if ADAPTER in getattr(self.unet, "peft_config", {}):
            self.unet.delete_adapters(ADAPTER)  # left by an earlier policy on this pipeline
        self._add_lora(lora_rank, seed)
        self._border = Border(self.parameters()) if self.dtype == torch.float16 else None
        self.together = shard
        if shard:
            shard_over_processes(self.unet, self.vae.device, self.parameters())
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.unet.train()  # diffusers checkpoints in training mode only; SD has no dropout
        if vae_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.vae_slice = vae_slice
        size = self.unet.config.sample_size
        self.sample_shape: tuple[int, ...] = (self.unet.config.in_channels, size, size)
        self.alphas_cumprod: Tensor = pipeline.scheduler.alphas_cumprod.double().cpu()
        self._levels = _on_device(self.alphas_cumprod, self.device)
        self.prediction_type: str = pipeline.scheduler.config.prediction_type
        self._embeds: dict[str, Tensor] = {}  # on the CPU: a prompt set can have thousands
        self._empty: Tensor | None = None
        self._encoder_hook: Any = None

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        revision: str = "main",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        guidance_scale: float = 5.0,
        lora_rank: int = 8,
        seed: int = 0,
        gradient_checkpointing: bool = False,
        vae_checkpointing: bool = False,
        vae_slice: int = 0,
        shard: bool = False,
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
        return cls(
            pipeline,
            guidance_scale=guidance_scale,
            lora_rank=lora_rank,
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
            vae_checkpointing=vae_checkpointing,
            vae_slice=vae_slice,
            name=model,
            shard=shard,
        )

    def _add_lora(self, rank: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.seed_of(seed, "lora"))
            self.unet.add_adapter(
                LoraConfig(
                    r=rank,
                    lora_alpha=rank,
                    init_lora_weights="gaussian",
                    target_modules=LORA_TARGETS,
                ),
                adapter_name=ADAPTER,
            )
        for parameter in self.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the frozen U-Net."""
        return self.unet.conv_in.weight.dtype

    def timesteps(self, scheduler: str, num_steps: int) -> list[int]:
        """diffusers' own timesteps for this model, kept in 1..T-1: a step at 0 adds no noise."""
        config = self.pipeline.scheduler.config
        offset = max(1, config.get("steps_offset", 0))
        if scheduler == "dpm-solver":
            solver = DPMSolverMultistepScheduler.from_config(
                config,
                steps_offset=offset,
                algorithm_type="sde-dpmsolver++",
                solver_order=1,
                final_sigmas_type="sigma_min",
            )
        else:
            solver = DDIMScheduler.from_config(config, steps_offset=offset)
        solver.set_timesteps(num_steps)
        noisiest = len(self.alphas_cumprod) - 1
        return solver.timesteps.clamp(1, noisiest).tolist()

    def condition(self, prompts: Sequence[str], metadata: Sequence[Metadata] = ()) -> Condition:
        """Prompts with their embeddings."""
        return Condition(
            prompts=tuple(prompts),
            metadata=tuple(metadata) or tuple({} for _ in prompts),
            embeds=self._encode(prompts),
        )

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, L, D] on the policy's device; each distinct prompt goes through the encoder once."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._embeds]
        if missing:
            tokens = self.pipeline.tokenizer(
                missing,
                padding="max_length",
                truncation=True,
                max_length=self.pipeline.tokenizer.model_max_length,
                return_tensors="pt",
            )
            with torch.no_grad():
                embeds = self.pipeline.text_encoder(tokens.input_ids.to(self.device))[0]
            if self._encoder_hook is not None:
                self._encoder_hook.offload()
            self._embeds.update(zip(missing, embeds.cpu(), strict=True))
        return torch.stack([self._embeds[p] for p in prompts]).to(self.device)

    def offload_text_encoder(self) -> None:
        """Keep the text encoder in the computer's memory but while it encodes a new prompt."""
        encoder, hook = cpu_offload_with_hook(self.pipeline.text_encoder, self.device)
        self.pipeline.text_encoder, self._encoder_hook = encoder, hook

    def eps(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Guided ε (Ho & Salimans 2022): ε_∅ + w(ε_c − ε_∅), in x's dtype, [M, C, H, W]."""
        assert condition.embeds is not None
        if self.guidance_scale == 1.0:
            return self._eps(x, timestep, condition.embeds)
        if self._empty is None:  # kept on the device: every evaluation needs it
            self._empty = self._encode([""])
        empty = self._empty.expand_as(condition.embeds)
        both = self._eps(
            torch.cat([x, x]),
            torch.cat([timestep, timestep]),
            torch.cat([empty, condition.embeds]),
        )
        unconditional, conditional = both.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _eps(self, x: Tensor, timestep: Tensor, embeds: Tensor) -> Tensor:
        unet = self.unet if torch.is_grad_enabled() else self.unet_free or self.unet

        def network(x: Tensor) -> Tensor:
            found: Tensor = unet(x, timestep, embeds, return_dict=False)[0]
            return found

        if self._border is None:
            output = network(x.to(self.dtype)).to(x.dtype)
        else:
            output = self._border(network, x)
        level = self._levels[timestep].to(x.dtype)
        return eps_from_model_output(
            output, x, level.reshape(-1, *([1] * (x.ndim - 1))), self.prediction_type
        )

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The frozen pretrained model: LoRA off. Backward passes through checkpointed layers of
        the frozen model must also run inside."""
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

    def decode(self, x: Tensor) -> Tensor:
        """Latents [M, C, H, W] to images [M, 3, H', W'], nominally in [0, 1], not clamped.

        Without a gradient `vae_slice` at a time.
        """
        if self.vae_slice and not wants_gradient(x):
            return torch.cat([self._decode(part) for part in x.split(self.vae_slice)])
        return self._decode(x)

    def _decode(self, x: Tensor) -> Tensor:
        latents = (x / self.vae.config.scaling_factor).to(self.vae.dtype)
        return (self.vae.decode(latents, return_dict=False)[0] / 2 + 0.5).to(x.dtype)

    def make_flow(
        self, widths: Sequence[int], layers_per_block: int, seed: int, *, hint: bool = False
    ) -> nn.Module:
        """A new g_φ on the policy's device, exactly zero at start."""
        text_width = self.pipeline.text_encoder.config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.seed_of(seed, "flow"))
            flow = UNetFlow(self.sample_shape, text_width, widths, layers_per_block, hint=hint)
        return flow.to(self.device)

    def settings(self) -> dict[str, Any]:
        """Model, guidance, rank and sharding as they are, whatever a config says."""
        return {
            "training.shard_base": self.together,
            "pretrained.model": self.name,
            "sampling.guidance_scale": self.guidance_scale,
            "model.lora_rank": self.unet.peft_config[ADAPTER].r,
        }

    def parameters(self) -> list[nn.Parameter]:
        """θ: the LoRA's matrices."""
        return [p for name, p in self.unet.named_parameters() if ".lora_" in name]

    def state_dict(self) -> dict[str, Tensor]:
        """The LoRA by peft's names."""
        return get_peft_model_state_dict(self.unet)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when the state is not this LoRA's."""
        mine = {name: value.shape for name, value in self.state_dict().items()}
        if mine != {name: value.shape for name, value in state.items()}:
            raise ValueError("the LoRA weights do not fit this model: other layers or another rank")
        set_peft_model_state_dict(self.unet, dict(state), adapter_name=ADAPTER)

    def save(self, folder: Path) -> None:
        """`pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(folder)`."""
        self.pipeline.save_lora_weights(
            folder, unet_lora_layers=convert_state_dict_to_diffusers(self.state_dict())
        )
