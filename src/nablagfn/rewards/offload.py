"""Rewards whose weights are on the device only while they score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor, nn

from ..core.surrogate import wants_gradient, with_gradient
from ..core.types import Metadata, Reward
from ..runtime.costs import tensors_of
from .compose import Composition
from .registry import NamedReward, named


def modules_of(thing: object, depth: int = 6) -> list[nn.Module]:
    """The modules within a reward, each once: itself, or in its attributes, `depth` levels down."""
    if isinstance(thing, nn.Module):
        return [thing]
    if isinstance(thing, ModuleType) or not depth:
        return []
    inside = thing if isinstance(thing, (tuple, list)) else getattr(thing, "__dict__", {}).values()
    return list(dict.fromkeys(m for part in inside for m in modules_of(part, depth - 1)))


def networks_of(thing: object) -> list[nn.Module]:
    """What of a reward can be compiled: of each module its `networks`, which never see a prompt (a
    graph is made anew for every text), or all of it if it has none."""
    return [n for module in modules_of(thing) for n in getattr(module, "networks", (module,))]


def components_of(reward: NamedReward) -> list[NamedReward]:
    """The rewards that a weighted sum is made of; or the reward alone."""
    if isinstance(reward.function, Composition):
        return [named(component.reward) for component in reward.function.components]
    return [reward]


def offloaded(reward: NamedReward) -> NamedReward:
    """The same scores; weights wait in the computer's memory, each component's apart.

    Modules are found in the reward's attributes; what it reaches otherwise stays where it is.
    """
    function = reward.function
    made = {**reward.made_with, "speed.offload_reward": True}
    if isinstance(function, Composition):
        parts = tuple(
            replace(component, reward=offloaded(part))
            for component, part in zip(function.components, components_of(reward), strict=True)
        )
        return replace(reward, function=replace(function, components=parts), made_with=made)
    modules = modules_of(function)
    if not modules:
        return replace(reward, made_with=made)
    for module in modules:
        module.to("cpu")
    return replace(reward, function=Offloaded(reward, modules), made_with=made)


class Offloaded:
    """Brings the modules of a reward to its pictures and takes them away again.

    A graph would hold the weights there until it is differentiated, beside the decoder's. So
    scores that will be differentiated are differentiated at once, which needs that no score
    depends on another's picture.
    """

    def __init__(self, reward: Reward, modules: Sequence[nn.Module]) -> None:
        self.reward = reward
        self.modules = modules

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """images [B, 3, H, W] -> [B]."""
        with visiting(self.modules, images.device):
            if not wants_gradient(images):
                return self.reward(images, prompts, metadata)
            x = images.detach().requires_grad_()
            value = self.reward(x, prompts, metadata)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return with_gradient(images, value, gradient)


@contextmanager
def visiting(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside it their weights are copies on `device`; the originals stay and come back."""
    own = {id(t): t for t in tensors_of(modules)}
    home = {key: tensor.data for key, tensor in own.items()}
    try:
        for tensor in own.values():
            tensor.data = copied(tensor.data, device)
        yield
    finally:
        for key, tensor in own.items():
            tensor.data = home[key]


def copied(data: Tensor, device: torch.device) -> Tensor:
    """Copy `data` to the device."""
    return data.to(device)
