"""What all latent models share: a LoRA on a frozen network, guidance, the VAE, and their state."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import cpu_offload_with_hook
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ..config import ConfigError, Speed
from ..config.model import lora_strength
from ..core import rng
from ..core.schedules import Noising, Prediction
from ..core.start import KEY, FirstState
from ..core.surrogate import wants_gradient
from ..core.types import Condition, Metadata
from .flow import UNetFlow
from .in_range import Border
from .latent_model import LatentModel
from .lora import ALL, FIRST_STATE, MEAN, endings
from .shard import shard as shard_over_processes

ADAPTER = "default"


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


def set_sampler(
    pipeline: Any,
    scheduler: str,
    options: Mapping[str, Any],
    taken: Mapping[str, str],
    *,
    counts: bool = False,
) -> None:
    """Give the pipeline another scheduler of diffusers, by the name of its class.

    taken: options that have the value of another one of its present scheduler. counts: as
    `count_steps` says.
    """
    if not scheduler:  # its own
        return
    kind, config = getattr(diffusers, scheduler), pipeline.scheduler.config
    copied = {name: config[other] for name, other in taken.items()}
    with quiet():  # of the present one's options that the other does not have
        pipeline.scheduler = kind.from_config(config, **options, **copied)
    if counts:
        count_steps(pipeline.scheduler)


def count_steps(scheduler: Any) -> None:
    """Let a scheduler that sets its own steps be given their σ, of which it takes the number, and
    a μ that it is not configured for."""
    begin = scheduler.set_timesteps

    def begun(
        steps: int | None = None,
        device: Any = None,
        sigmas: Sequence[float] = (),
        mu: float | None = None,
    ) -> None:
        shifts = scheduler.config.use_dynamic_shifting
        begin(steps or len(sigmas), device, mu=mu if shifts else None)

    scheduler.set_timesteps = begun


class LatentPolicy:
    """A latent model with a trainable LoRA.

    The guidance of both the finetuned and the frozen model is that of `model.asked`. lora_rank:
    rank and alpha. lora_targets: as the option; raises ConfigError for layers that there are none
    of. lora_until: share ᾱ of signal, in 0..1, up to which the LoRA acts. lora_fade: p, >= 0, of
    its strength (lora_until/ᾱ)^p there. seed: of the LoRA's gaussian initialisation. The LoRA is
    float32 whatever the dtype of the frozen weights. vae_slice: pictures decoded at a time (0: all)
    where no gradient is taken. name: hub name or folder, for the run's records. shard: the
    network's frozen weights are spread over the processes (`models.shard`), on the device of the
    VAE.
    """

    def __init__(
        self,
        model: LatentModel,
        *,
        lora_rank: int = 8,
        lora_targets: Sequence[str] = ("attention",),
        lora_until: float = 1.0,
        lora_fade: float = 0.0,
        seed: int = 0,
        gradient_checkpointing: bool = False,
        vae_checkpointing: bool = False,
        vae_slice: int = 0,
        name: str = "",
        shard: bool = False,
    ) -> None:
        self.model = model
        self.pipeline = pipeline = model.pipeline
        self.name = name or str(pipeline.name_or_path or "unnamed")
        self.network: Any = model.network
        self.network_free: Callable[..., Any] | None = None  # where no gradient is taken
        self.vae = pipeline.vae
        for module in (self.network, self.vae, *self.encoders().values()):
            module.requires_grad_(False)
            module.eval()
        if ADAPTER in getattr(self.network, "peft_config", {}):
            self.network.delete_adapters(ADAPTER)  # left by an earlier policy on this pipeline
        self.lora_targets = tuple(lora_targets)
        self.lora_until = lora_until
        self.lora_fade = lora_fade
        self.first = FirstState()
        self._gate: Tensor | None = None  # [rows] of the pass in progress: the LoRA's strength
        self._add_lora(lora_rank, seed)
        names = (name for name, _ in self.network.named_parameters())
        self._frozen = next(name for name in names if ".lora_" not in name)  # one of its weights
        self._border = Border(self.parameters()) if self.dtype == torch.float16 else None
        self.together = shard
        if shard:
            shard_over_processes(self.network, self.vae.device, self.parameters())
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
            self.network.train()  # diffusers checkpoints in training mode only; SD has no dropout
        if vae_checkpointing:
            self.vae.enable_gradient_checkpointing()
        self.vae_slice = vae_slice
        self.gradient_checkpointing, self.vae_checkpointing = (
            gradient_checkpointing,
            vae_checkpointing,
        )
        self.speed = Speed()  # what `tune` has set up
        self.sample_shape: tuple[int, ...] = model.sample_shape
        self.prediction: Prediction = model.prediction
        self.noising: Noising = model.noising
        self._encoded: dict[str, dict[str, Tensor]] = {}  # on the CPU: prompt sets can be large
        self._empty: dict[str, Tensor] | None = None
        self._encoder_hooks: list[Any] = []

    @property
    def guidance_scale(self) -> float:
        """w of guidance, of both the finetuned and the frozen model; 1 switches it off."""
        return self.model.asked.guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, w: float) -> None:
        self.model.asked = replace(self.model.asked, guidance_scale=w)

    def encoders(self) -> dict[str, nn.Module]:
        """The pipeline's text encoders by name; a pipeline may be without some."""
        found = {name: getattr(self.pipeline, name) for name in self.model.encoders}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    def _add_lora(self, rank: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.seed_of(seed, "lora"))
            self.network.add_adapter(
                LoraConfig(
                    r=rank,
                    lora_alpha=rank,
                    init_lora_weights="gaussian",
                    target_modules=self._lora_layers(),
                ),
                adapter_name=ADAPTER,
            )
        for parameter in self.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
        if self.lora_varies:
            for name, layer in self.network.named_modules():
                if name.endswith(f".lora_B.{ADAPTER}"):
                    layer.register_forward_hook(self._gated)

    def _gated(self, layer: nn.Module, given: object, found: Tensor) -> Tensor:
        """What a LoRA adds to its layer, [rows, ...], with the strength of each row's time."""
        if self._gate is None:
            return found
        if len(found) != len(self._gate):
            raise ConfigError(
                "config.model.lora_until and lora_fade: a layer with a LoRA sees the samples of a "
                "batch run together, and cannot be told their noise levels: leave "
                "config.model.lora_targets at attention"
            )
        return found * self._gate.reshape(-1, *[1] * (found.ndim - 1)).to(found.dtype)

    @property
    def lora_varies(self) -> bool:
        """Whether the LoRA's strength is not the same at all times."""
        return self.lora_until < 1 or self.lora_fade > 0

    def lora_strength(self, time: Tensor) -> Tensor:
        """How strongly the LoRA acts at times [rows]: (lora_until/ᾱ)^p, and 0 above lora_until."""
        if self.noising.whole:  # a table, for which nothing waits
            return self._strengths[time.long().to(self._strengths.device)]
        return self._strength_at(time)

    @functools.cached_property
    def _strengths(self) -> Tensor:
        """[T] by whole-numbered time, on the model's device."""
        times = torch.arange(self.noising.cleanest, self.noising.noisiest + 1)
        before = torch.zeros(int(self.noising.cleanest))
        return torch.cat([before, self._strength_at(times)]).to(self.device)

    def _strength_at(self, time: Tensor) -> Tensor:
        levels = self.noising.levels(time).alpha_bar.tolist()
        found = [lora_strength(level, self.lora_until, self.lora_fade) for level in levels]
        return torch.tensor(found, device=time.device)

    def _lora_layers(self) -> list[str]:
        """The names of the layers that get one, all of them linear or convolutions of all
        channels."""
        able = [
            name.removesuffix(".base_layer")  # an earlier policy's adapter lay around it
            for name, layer in self.network.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and ".lora_" not in name
            if getattr(layer, "groups", 1) == 1  # a channel alone has no low rank
        ]
        idle = self.model.idle_layers()
        able = [name for name in able if name not in idle]
        if ALL in self.lora_targets:
            return able
        found = []
        for word in self.lora_targets:
            ends = endings((word,), self.model.lora_targets)
            if word in self.model.lora_targets:  # of the blocks: none of the network's own ends
                own = [name for name in able if any(name.endswith(f".{end}") for end in ends)]
            else:
                own = [name for name in able if f".{name}".endswith(f".{word}")]
            if not own:
                raise ConfigError(
                    f"config.model.lora_targets={word}: the model has no such linear layer or "
                    f"convolution; take {', '.join(self.model.lora_targets)}, {ALL}, or endings of "
                    "its names, as to_v"
                )
            found += own
        return list(dict.fromkeys(found))

    def lora_strengths(self, times: Sequence[float]) -> tuple[float, ...]:
        """How strongly the LoRA acts in each of a sampler's steps; none: with 1 in all."""
        if not self.lora_varies:
            return ()
        return tuple(float(self.lora_strength(torch.tensor([time]))[0]) for time in times)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen network."""
        dtype: torch.dtype = self.network.get_parameter(self._frozen).dtype
        return dtype

    def times(self, grid: str, num_steps: int) -> Sequence[float]:
        return self.model.times(grid, num_steps)

    # ---------------------------------------------------------------- prompts

    def condition(self, prompts: Sequence[str], metadata: Sequence[Metadata] = ()) -> Condition:
        """Prompts with what the network is given of them, on the policy's device.

        Each distinct prompt goes through the encoders once.
        """
        missing = [p for p in dict.fromkeys(prompts) if p not in self._encoded]
        if missing:
            self._encode(missing)
        rows = [self._encoded[prompt] for prompt in prompts]
        return Condition(
            prompts=tuple(prompts),
            metadata=tuple(metadata) or tuple({} for _ in prompts),
            tensors={
                name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]
            },
        )

    def _encode(self, prompts: Sequence[str]) -> None:
        encoded = self._asked(lambda device: self.model.encode(prompts, device))
        found = {name: value.cpu() for name, value in encoded.items()}
        for row, prompt in enumerate(prompts):
            self._encoded[prompt] = {name: value[row] for name, value in found.items()}

    def _negative(self) -> dict[str, Tensor]:
        """What the network is given beside the prompts in guidance, each [1, ...]."""
        found = self._asked(self.model.negative)
        return {name: value.to(self.device) for name, value in found.items()}

    def _asked(self, encode: Callable[[torch.device], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What the text encoders make of something; those that only visit the device leave it."""
        with torch.no_grad(), quiet():
            found = encode(self.device)
        for hook in self._encoder_hooks:
            hook.offload()
        return found

    def offload_text_encoder(self) -> None:
        """Keep the text encoders in the computer's memory but while each encodes new prompts."""
        hook = None
        for name, encoder in self.encoders().items():  # each gives way to the next
            placed, hook = cpu_offload_with_hook(encoder, self.device, prev_module_hook=hook)
            setattr(self.pipeline, name, placed)
            self._encoder_hooks.append(hook)

    # ---------------------------------------------------------------- the network

    def output(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Guided u (`LatentModel.guide`), in x's dtype, [M, C, H, W]."""
        if self.model.passes == 1:
            return self._output(x, time, condition.tensors)
        if self._empty is None:  # kept on the device: every evaluation needs it
            self._empty = self._negative()
        both = self._output(
            torch.cat([x, x]),
            torch.cat([time, time]),
            {
                name: torch.cat([self._empty[name].expand_as(value), value])
                for name, value in condition.tensors.items()
            },
        )
        unconditional, conditional = both.chunk(2)
        return self.model.guide(conditional, unconditional)

    def _output(self, x: Tensor, time: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        free = None if torch.is_grad_enabled() else self.network_free
        network = free or self.network

        def called(x: Tensor) -> Tensor:
            return self.model.call(network, x, time, given)

        self._gate = self.lora_strength(time) if self.lora_varies else None
        try:
            if self._border is None:
                return called(x.to(self.dtype)).to(x.dtype)
            return self._border(called, x)
        finally:
            self._gate = None  # the pipeline's own passes have other rows

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The frozen pretrained model: LoRA off. Backward passes through checkpointed layers of
        the frozen model must also run inside."""
        self.network.disable_adapters()
        try:
            with self.first.reference():
                yield
        finally:
            self.network.enable_adapters()

    def decode(self, x: Tensor) -> Tensor:
        """Latents [M, C, H, W] to images [M, 3, H', W'], nominally in [0, 1], not clamped.

        Without a gradient `vae_slice` at a time.
        """
        if self.vae_slice and not wants_gradient(x):
            return torch.cat([self._decode(part) for part in x.split(self.vae_slice)])
        return self._decode(x)

    def _decode(self, x: Tensor) -> Tensor:
        return (self.model.decode(x) / 2 + 0.5).to(x.dtype)

    def make_flow(
        self, widths: Sequence[int], layers_per_block: int, seed: int, *, hint: bool = False
    ) -> nn.Module:
        """A new g_φ on the policy's device, exactly zero at start."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.seed_of(seed, "flow"))
            flow = UNetFlow(
                self.sample_shape,
                self.model.text,
                self.model.text_width,
                widths,
                layers_per_block,
                hint=hint,
                time_scale=1.0 if self.noising.whole else 1000 / self.noising.noisiest,
            )
        return flow.to(self.device)

    # ---------------------------------------------------------------- records and state

    def settings(self) -> dict[str, Any]:
        """Every option that this policy was built with, as it is, whatever a config says."""
        precision = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(self.dtype, "no")
        on_cpu = self.device.type == "cpu" and precision == "no"  # where it is what every choice is
        speed = self.speed.model_dump(
            exclude={"fused_optimizer", "compile_reward", "offload_reward"}
        )
        return {
            "training.shard_base": self.together,
            "training.gradient_checkpointing": self.gradient_checkpointing,
            "training.vae_checkpointing": self.vae_checkpointing,
            "training.vae_slice": self.vae_slice,
            **({} if on_cpu else {"training.mixed_precision": precision}),
            **{f"speed.{name}": value for name, value in speed.items()},
            "pretrained.model": self.name,
            "pretrained.family": self.model.family,
            **{f"sampling.{name}": value for name, value in asdict(self.model.asked).items()},
            "model.lora_targets": self.lora_targets,
            "model.lora_until": self.lora_until,
            "model.lora_fade": self.lora_fade,
            "model.lora_rank": self.network.peft_config[ADAPTER].r,
        }

    def parameters(self) -> list[nn.Parameter]:
        """θ: the LoRA's matrices."""
        return [p for name, p in self.network.named_parameters() if ".lora_" in name]

    def state_dict(self) -> dict[str, Tensor]:
        """`lora`, and the mean of the first state where it has one."""
        return {**self.lora(), **self.first.state_dict()}

    def lora(self) -> dict[str, Tensor]:
        """The LoRA's matrices by peft's names."""
        found: dict[str, Tensor] = get_peft_model_state_dict(self.network)
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when the state is not this LoRA's."""
        mine = {name: value.shape for name, value in self.lora().items()}
        if KEY in state:
            mine[KEY] = torch.Size(self.sample_shape)
        if mine != {name: value.shape for name, value in state.items()}:
            raise ValueError("the LoRA weights do not fit this model: other layers or another rank")
        lora = self.first.load(state)
        set_peft_model_state_dict(self.network, lora, adapter_name=ADAPTER)

    def save(self, folder: Path) -> None:
        """`pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(folder)`, and what
        `save_first_state` writes."""
        self.model.save(folder, self.lora())
        self.save_first_state(folder)

    def save_first_state(self, folder: Path) -> None:
        """`first_state.safetensors`, which is added to the latents of `pipe(…, latents=…)`; nothing
        where its mean is 0."""
        if self.first.mean is not None:
            save_file({MEAN: self.first.mean.cpu().contiguous()}, folder / FIRST_STATE)
