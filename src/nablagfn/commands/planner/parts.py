"""What one row of each part of a run costs, counted on the meta device."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ... import rewards
from ...config import Config, ConfigError
from ...core.types import Condition
from ...families import find_family
from ...methods.registry import find_method
from ...models.latent import LatentPolicy
from ...models.latent_model import vae_dtype
from ...rewards import NamedReward, components_of, modules_of
from ...rewards.clip import ClipScore
from ...rewards.imagereward import ImageReward
from ...runtime.costs import Cost, collected_by_count, cost, per_row, size_of, tensors_of
from ...runtime.distributed import weight_dtype
from .. import architectures

META = torch.device("meta")
PROMPT = "a"  # any will do
NOTHING = Cost(0, 0, 0, 0)


@dataclass(frozen=True)
class Costs:
    """A run's model in numbers. fixed: bytes by what they are. The costs are those of one row, a
    guided evaluation counting as one; `_checkpointed` with gradient checkpointing, `_free` without
    gradient. sample: bytes of one x. visiting: of the reward's weights, if they are there while it
    scores only. encoding: of the largest text encoder, if each is there while it encodes only."""

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
    visiting: float = 0.0
    encoding: float = 0.0

    def prices(self, *, checkpointing: bool) -> dict[str, Cost]:
        """FLOPs of one row, by the parts of `work.update_passes`."""
        return {
            "drawing": self.eps_free,
            "U-Net": self.eps_checkpointed if checkpointing else self.eps,
            "decoder": self.decode,
            "reward": self.reward,
            "flow network": self.flow,
        }


def measure(config: Config, device: torch.device) -> Costs:
    """Counted for `config` on a device like this one.

    Raises ConfigError when the model's configuration or the reward cannot be had.
    """
    if find_family(config).skeleton is None:
        raise ConfigError(f"{config.pretrained.model} is a world: it fits into any memory")
    with META:
        subject = build_subject(config, weight_dtype(config, device), META)
        parts = subject.parts(_fixed(config, subject))
        return replace(
            parts,
            visiting=_visiting(config, subject.reward),
            encoding=_encoding(config, subject.policy),
        )


def build_subject(config: Config, dtype: torch.dtype, place: torch.device) -> Subject:
    """The run's architecture with random weights on `place`, called inside its context. Raises
    ConfigError like `measure`."""
    skeleton, model = find_family(config).skeleton, config.model
    assert skeleton is not None
    policy = skeleton(config)
    for part in (policy.network, *encoders_of(policy)):
        _cast(part, dtype)
    for parameter in policy.parameters():
        parameter.data = parameter.data.float()
    _cast(policy.vae, vae_dtype(type(policy.model), dtype))
    flow = None
    if find_method(config.experiment.method).learns_flow(config):
        flow = policy.make_flow(model.flow_channel_width, model.flow_layers_per_block, seed=0)
    return Subject(policy, flow, _reward(config, place))


def encoders_of(policy: LatentPolicy) -> list[nn.Module]:
    """The text encoders of its pipeline."""
    return list(policy.encoders().values())


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, kept in module.named_buffers():
        if kept.is_floating_point():  # as from_pretrained does
            owner, _, own = name.rpartition(".")
            setattr(module.get_submodule(owner), own, kept.to(dtype))


def _reward(config: Config, place: torch.device) -> NamedReward:
    """The reward on `place`; the large ones by their architecture alone."""
    name = config.experiment.reward_fn
    if name in architectures.REWARDS:
        reward = NamedReward(name, architectures.REWARDS[name]())
    else:
        with torch.device("cpu"):  # weights that are read are moved when they are there
            reward = rewards.resolve(name, place, config.reward.weights, config.reward)
    for module in modules_of(reward):
        if isinstance(module, ImageReward):
            module.text = _PassedBy(module.text)
        if isinstance(module, ClipScore):  # prompts are encoded once, without gradient
            width = module.model.config.projection_dim
            module.remember(PROMPT, torch.zeros(width, device="cpu"))
    return reward


class _PassedBy(nn.Module):
    """It stands in for BLIP's text encoder, which looks into its mask and so needs true tokens. Its
    weights count; its work, a tenth of the picture encoder's, does not."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.text = text
        self.width: int = text.config.hidden_size

    def forward(self, encoder_hidden_states: Tensor, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=encoder_hidden_states[..., : self.width])


@dataclass(frozen=True)
class Runnable:
    """Something to run forward and, where `gradient`, back from its result.

    known: the weights and inputs that it uses.
    """

    run: Callable[[], Tensor]
    known: list[Tensor]
    gradient: bool = True

    def clear(self) -> None:
        """Forget the gradients that it left."""
        for tensor in self.known:
            tensor.grad = None


@dataclass(frozen=True)
class Subject:
    """The parts of a run, each as a pass of some rows. Call them inside the device's context.

    flow: g_φ; None where the run learns none.
    """

    policy: LatentPolicy
    flow: nn.Module | None
    reward: NamedReward

    @collected_by_count()
    def parts(self, fixed: Mapping[str, float]) -> Costs:
        with self.checkpointing(True):
            checkpointed = self._cost(self.eps)
        return Costs(
            fixed=fixed,
            eps=self._cost(self.eps),
            eps_checkpointed=checkpointed,
            eps_free=self._cost(self.eps, gradient=False),
            decode=self._cost(self.decode),
            decode_free=self._cost(self.decode, gradient=False),
            reward=self._cost(self.score),
            reward_free=self._cost(self.score, gradient=False),
            flow=NOTHING if self.flow is None else self._cost(self.guess),
            sample=size_of([self.x(1)]),
        )

    def _cost(self, make: Callable[[int, bool], Runnable], gradient: bool = True) -> Cost:
        """Count what one row of this pass costs."""
        if make == self.score and not self.reward.differentiable:
            return NOTHING  # a black box may need true pictures

        def of(rows: int) -> Cost:
            made = make(rows, gradient)
            found = cost(made.run, made.known, gradient=gradient)
            made.clear()
            return found

        return per_row(of)

    def x(self, rows: int) -> Tensor:
        """Varied numbers. The device is named: transformers patches linspace while it loads a
        model, and if torch first lists its constructors then, the context forgets linspace."""
        shape = (rows, *self.policy.sample_shape)
        return torch.linspace(-2, 2, math.prod(shape), device=self.policy.device).reshape(shape)

    def given(self, rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """What the network is given beside x and the time."""
        blank = self.policy.model.blank(rows)
        return {name: value.to(dtype) for name, value in blank.items()}

    def eps(self, rows: int, gradient: bool) -> Runnable:
        policy, copies = self.policy, self.policy.model.passes
        x = self.x(rows).requires_grad_(gradient)
        time = torch.zeros(copies * rows, dtype=torch.long)
        given = self.given(copies * rows, policy.dtype)

        def run() -> Tensor:
            seen = torch.cat([x] * copies).to(policy.dtype)
            return policy.model.call(policy.network, seen, time, given).float()

        return Runnable(run, [*tensors_of([policy.network]), x, time, *given.values()], gradient)

    @contextlib.contextmanager
    def checkpointing(self, on: bool) -> Iterator[None]:
        """Inside it the network's activations are recomputed, if `on`."""
        network = self.policy.network
        if on:
            network.enable_gradient_checkpointing()
            network.train()
        try:
            yield
        finally:
            network.disable_gradient_checkpointing()
            network.eval()

    def decode(self, rows: int, gradient: bool) -> Runnable:
        x = self.x(rows).requires_grad_(gradient)
        run = functools.partial(self.policy.decode, x)
        return Runnable(run, [*tensors_of([self.policy.vae]), x], gradient)

    def score(self, rows: int, gradient: bool) -> Runnable:
        """Make a pass that scores pictures; a black box has no way back."""
        gradient = gradient and self.reward.differentiable
        with torch.no_grad():
            images = self.policy.decode(self.x(rows))
        images.requires_grad_(gradient)

        def run() -> Tensor:
            try:
                return self.reward(images, [PROMPT] * rows, [{}] * rows)
            except (RuntimeError, NotImplementedError, ConfigError) as error:
                raise ConfigError(
                    f"config.experiment.reward_fn={self.reward.name!r} cannot be counted without "
                    f"pictures ({error}): plan with a built-in reward of its size"
                ) from None

        return Runnable(run, [*tensors_of(modules_of(self.reward)), images], gradient)

    def guess(self, rows: int, gradient: bool) -> Runnable:
        x, given, time = self.x(rows), self.given(rows), torch.zeros(rows, dtype=torch.long)
        where = Condition((PROMPT,) * rows, ({},) * rows, given)
        assert self.flow is not None
        run = functools.partial(self.flow, x, time, where)
        return Runnable(run, [*tensors_of([self.flow]), x, *given.values(), time], gradient)


def _fixed(config: Config, subject: Subject) -> dict[str, float]:
    """Count the bytes of weights, and of gradients and moments of what is trained."""
    policy, theta = subject.policy, size_of(subject.policy.parameters())
    flow = 0 if subject.flow is None else size_of(subject.flow.parameters())
    moments = {"lion": 1.0, "adamw8bit": 0.5}.get(config.training.optimizer, 2.0)
    copies = 2 + moments  # of the float32 weights, gradients among them
    speed = config.speed
    words, reward = tensors_of(encoders_of(policy)), tensors_of(modules_of(subject.reward))
    return {
        find_family(config).network: size_of(tensors_of([policy.network])) - theta,
        "VAE": size_of(tensors_of([policy.vae])),
        "text encoders" if len(policy.encoders()) > 1 else "text encoder": 0
        if speed.offload_text_encoder
        else size_of(words),
        "reward": 0 if speed.offload_reward else size_of(reward),
        "LoRA and its optimizer": copies * theta,
        "flow network and its optimizer": copies * flow,
    }


def _encoding(config: Config, policy: LatentPolicy) -> float:
    """Count the bytes of the largest text encoder, if they come and go."""
    if not config.speed.offload_text_encoder:
        return 0.0
    sizes = [size_of(tensors_of([encoder])) for encoder in encoders_of(policy)]
    return float(max(sizes, default=0))


def _visiting(config: Config, reward: NamedReward) -> float:
    """Count the bytes of the largest component's weights, if they come and go."""
    if not config.speed.offload_reward:
        return 0.0
    return max(size_of(tensors_of(modules_of(part))) for part in components_of(reward))
