"""What one row of each part of a run costs, counted on the meta device."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import architectures, rewards, worlds
from ..config import Config, ConfigError
from ..costs import Cost, cost, per_row, size_of
from ..distributed import weight_dtype
from ..models.stable_diffusion import StableDiffusionPolicy
from ..rewards import NamedReward
from ..rewards.clip import ClipScore
from ..rewards.imagereward import ImageReward
from ..types import Condition

META = torch.device("meta")
PROMPT = "a"  # any will do
NOTHING = Cost(0, 0, 0, 0)


@dataclass(frozen=True)
class Parts:
    """A run's model in numbers. fixed: bytes by what they are. The costs are those of one row, a
    guided evaluation counting as one; `_checkpointed` with gradient checkpointing, `_free` without
    gradient. sample: bytes of one x."""

    fixed: Mapping[str, float]
    eps: Cost
    eps_checkpointed: Cost
    eps_free: Cost
    decode: Cost
    decode_free: Cost
    reward: Cost
    reward_free: Cost
    flow: Cost
    sample: float


def measure(config: Config, device: torch.device) -> Parts:
    """Counted for `config` on a device like this one.

    Raises ConfigError when the model's configuration or the reward cannot be had.
    """
    if worlds.is_world(config.pretrained.model):
        raise ConfigError(f"{config.pretrained.model} is a world: it fits into any memory")
    dtype = weight_dtype(config, device)
    with META:
        pipeline = architectures.by_configuration(
            config.pretrained.model, config.pretrained.revision
        )
        _cast(pipeline.unet, dtype)
        _cast(pipeline.text_encoder, dtype)
        _cast(pipeline.vae, torch.float32 if dtype == torch.float16 else dtype)
        policy = StableDiffusionPolicy(
            pipeline,
            guidance_scale=config.sampling.guidance_scale,
            lora_rank=config.model.lora_rank,
            vae_checkpointing=config.training.vae_checkpointing,
        )
        model = config.model
        flow = policy.make_flow(model.flow_channel_width, model.flow_layers_per_block, seed=0)
        subject = _Subject(policy, flow, _reward(config))
        return subject.parts(_fixed(config, subject))


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _reward(config: Config) -> NamedReward:
    """The reward on the meta device; the large ones by their architecture alone."""
    name = config.experiment.reward_fn
    if name in architectures.REWARDS:
        reward = NamedReward(name, architectures.REWARDS[name]())
    else:
        with torch.device("cpu"):  # weights that are read are moved when they are there
            reward = rewards.resolve(name, META, config.reward.weights, config.reward)
    for module in modules_of(reward):
        if isinstance(module, ImageReward):
            module.text = _PassedBy(module.text)
        if isinstance(module, ClipScore):  # prompts are encoded once, without gradient
            width = module.model.config.projection_dim
            module.remember(PROMPT, torch.zeros(width, device="cpu"))
    return reward


class _PassedBy(nn.Module):
    """In place of BLIP's text encoder, which looks into its mask and so needs true tokens. Its
    weights count; its work, a tenth of the picture encoder's, does not."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.text = text
        self.width: int = text.config.hidden_size

    def forward(self, encoder_hidden_states: Tensor, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=encoder_hidden_states[..., : self.width])


def modules_of(thing: object, depth: int = 6) -> list[nn.Module]:
    """The modules within a reward: itself, or in its attributes, `depth` levels down."""
    if isinstance(thing, nn.Module):
        return [thing]
    if isinstance(thing, ModuleType) or not depth:
        return []
    inside = thing if isinstance(thing, (tuple, list)) else getattr(thing, "__dict__", {}).values()
    return [module for part in inside for module in modules_of(part, depth - 1)]


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]


@dataclass(frozen=True)
class _Subject:
    """The parts of a run on the meta device, each with the cost of some rows."""

    policy: StableDiffusionPolicy
    flow: nn.Module
    reward: NamedReward

    def parts(self, fixed: Mapping[str, float]) -> Parts:
        return Parts(
            fixed=fixed,
            eps=per_row(lambda rows: self.eps(rows, True)),
            eps_checkpointed=per_row(self.eps_checkpointed),
            eps_free=per_row(lambda rows: self.eps(rows, False)),
            decode=per_row(lambda rows: self.decode(rows, True)),
            decode_free=per_row(lambda rows: self.decode(rows, False)),
            reward=per_row(lambda rows: self.score(rows, True)),
            reward_free=per_row(lambda rows: self.score(rows, False)),
            flow=per_row(self.guess),
            sample=size_of([self.x(1)]),
        )

    def x(self, rows: int) -> Tensor:
        return torch.zeros(rows, *self.policy.sample_shape)

    def text(self, rows: int) -> Tensor:
        words = self.policy.pipeline.text_encoder.config
        return torch.zeros(rows, words.max_position_embeddings, words.hidden_size)

    def eps(self, rows: int, gradient: bool) -> Cost:
        policy, copies = self.policy, 1 if self.policy.guidance_scale == 1.0 else 2
        x = self.x(rows).requires_grad_(gradient)
        time = torch.zeros(copies * rows, dtype=torch.long)
        text = self.text(copies * rows).to(policy.dtype)

        def run() -> Tensor:
            seen = torch.cat([x] * copies).to(policy.dtype)
            return policy.unet(seen, time, text, return_dict=False)[0].float()

        found = cost(run, [*_tensors([policy.unet]), x, time, text], gradient=gradient)
        policy.unet.zero_grad(set_to_none=True)
        return found

    def eps_checkpointed(self, rows: int) -> Cost:
        unet = self.policy.unet
        unet.enable_gradient_checkpointing()
        unet.train()
        try:
            return self.eps(rows, True)
        finally:
            unet.disable_gradient_checkpointing()
            unet.eval()

    def decode(self, rows: int, gradient: bool) -> Cost:
        x = self.x(rows).requires_grad_(gradient)
        run = functools.partial(self.policy.decode, x)
        return cost(run, [*_tensors([self.policy.vae]), x], gradient=gradient)

    def score(self, rows: int, gradient: bool) -> Cost:
        if not self.reward.differentiable:  # a black box may need true pictures
            return NOTHING
        images = self.policy.decode(self.x(rows)).detach().requires_grad_(gradient)
        run = functools.partial(self.reward, images, [PROMPT] * rows, [{}] * rows)
        known = [*_tensors(modules_of(self.reward)), images]
        try:
            return cost(run, known, gradient=gradient)
        except (RuntimeError, NotImplementedError, ConfigError) as error:
            raise ConfigError(
                f"config.experiment.reward_fn={self.reward.name!r} cannot be counted without "
                f"pictures ({error}): plan with a built-in reward of its size"
            ) from None

    def guess(self, rows: int) -> Cost:
        x, text, time = self.x(rows), self.text(rows), torch.zeros(rows, dtype=torch.long)
        where = Condition((PROMPT,) * rows, ({},) * rows, text)
        found = cost(
            functools.partial(self.flow, x, time, where),
            [*_tensors([self.flow]), x, text, time],
        )
        self.flow.zero_grad(set_to_none=True)
        return found


def learns_flow(config: Config) -> bool:
    learns = config.experiment.method in ("nabla-db", "nabla-db-lambda", "dag-db")
    return learns and not config.model.no_flow


def _fixed(config: Config, subject: _Subject) -> dict[str, float]:
    """Bytes of weights, and of gradients and moments of what is trained."""
    pipeline, theta = subject.policy.pipeline, size_of(subject.policy.parameters())
    flow = size_of(subject.flow.parameters()) if learns_flow(config) else 0
    moments = {"lion": 1.0, "adamw8bit": 0.5}.get(config.training.optimizer, 2.0)
    copies = 2 + moments  # of the float32 weights, gradients among them
    offloaded = config.speed.offload_text_encoder
    return {
        "U-Net": size_of(_tensors([pipeline.unet])) - theta,
        "VAE": size_of(_tensors([pipeline.vae])),
        "text encoder": 0 if offloaded else size_of(_tensors([pipeline.text_encoder])),
        "reward": size_of(_tensors(modules_of(subject.reward))),
        "LoRA and its optimizer": copies * theta,
        "flow network and its optimizer": copies * flow,
    }
