"""Find a reward by built-in name or by `package.module:function`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ConfigError
from ..types import Metadata, Reward
from . import analytic

Loader = Callable[[torch.device, str], Reward]


def _tiny_aesthetic(device: torch.device, weights: str) -> Reward:
    from .tiny import TinyAesthetic

    return TinyAesthetic(device)


def _tiny_alignment(device: torch.device, weights: str) -> Reward:
    from .tiny import TinyAlignment

    return TinyAlignment(device)


def _aesthetic(device: torch.device, weights: str) -> Reward:
    from .aesthetic import Aesthetic

    return Aesthetic.load(device, weights)


def _not_yet(name: str) -> Loader:
    def refuse(device: torch.device, weights: str) -> Reward:
        raise ConfigError(
            f"config.experiment.reward_fn={name!r} is not part of this release: give your own "
            "as package.module:function, or one of " + ", ".join(AVAILABLE)
        )

    return refuse


BUILT_IN: dict[str, Loader] = {
    "aesthetic": _aesthetic,
    "brightness": lambda device, weights: analytic.brightness,
    "colourfulness": lambda device, weights: analytic.colourfulness,
    "contrast": lambda device, weights: analytic.contrast,
    "tiny-aesthetic": _tiny_aesthetic,
    "tiny-alignment": _tiny_alignment,
}
AVAILABLE = tuple(BUILT_IN)
BUILT_IN |= {name: _not_yet(name) for name in ("hpsv2", "imagereward")}


@dataclass(frozen=True)
class NamedReward:
    """A reward with its name (`experiment.reward_fn`), whose results are checked."""

    name: str
    function: Reward

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """images [B, 3, H, W] -> [B]. Raises ConfigError when the result is of no use."""
        value = self.function(images, prompts, metadata)
        if not isinstance(value, Tensor) or value.shape != (len(images),):
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"the reward {self.name} must return a tensor of shape [{len(images)}], one score "
                f"per image, not {shape}"
            )
        if images.requires_grad and torch.is_grad_enabled() and not value.requires_grad:
            raise ConfigError(
                f"the reward {self.name} has no gradient with respect to the images: remove "
                "detach(), torch.no_grad() or conversions to numpy or PIL from it"
            )
        return value


def resolve(spec: str, device: torch.device, weights: str = "") -> NamedReward:
    """The reward named by `experiment.reward_fn`; `weights`: a folder instead of the hub.

    Raises ConfigError, one line, when there is no such reward or its weights are missing.
    """
    if spec in BUILT_IN:
        return NamedReward(spec, BUILT_IN[spec](device, weights))
    if ":" in spec:
        return NamedReward(spec, _import(spec))
    near = difflib.get_close_matches(spec, AVAILABLE, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"config.experiment.reward_fn={spec!r} is unknown: did you mean {near}? "
        "(your own: package.module:function)"
    )


def named(reward: Reward) -> NamedReward:
    """Any callable as a checked reward, named by where it can be imported from."""
    if isinstance(reward, NamedReward):
        return reward
    place = reward if hasattr(reward, "__qualname__") else type(reward)
    return NamedReward(f"{place.__module__}:{place.__qualname__}", reward)


def _import(spec: str) -> Reward:
    """Import `package.module:function`; the current folder is on the path, as for `python -m`."""
    module_name, _, attribute = spec.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(
            f"config.experiment.reward_fn={spec!r} cannot be imported: {error}"
        ) from None
    if not callable(found):
        raise ConfigError(f"config.experiment.reward_fn={spec!r} is not callable")
    return found
