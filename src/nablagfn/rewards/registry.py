"""Find a reward by built-in name, by `package.module:function`, or as a weighted sum of these."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError, RewardSettings
from ..config.dotted import import_object
from ..core.surrogate import wants_gradient
from ..core.types import Metadata, Reward
from . import analytic, blackbox
from .blackbox import ZerothOrder
from .compose import Component, Composition, Scores, parse, with_settings

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


def _imagereward(device: torch.device, weights: str) -> Reward:
    from .imagereward import ImageReward

    return ImageReward.load(device, weights)


def _module(name: str) -> Loader:
    """`load` of a module of this folder, imported when it is needed."""

    def load(device: torch.device, weights: str) -> Reward:
        return importlib.import_module(f".{name}", __package__).load(device, weights)

    return load


BUILT_IN: dict[str, Loader] = {
    "aesthetic": _aesthetic,
    "brightness": lambda device, weights: analytic.brightness,
    "warmth": lambda device, weights: analytic.warmth,
    "clipscore": _module("clipscore"),
    "colourfulness": lambda device, weights: analytic.colourfulness,
    "contrast": lambda device, weights: analytic.contrast,
    "hpsv2": _module("hpsv2"),
    "imagereward": _imagereward,
    "jpeg-size": lambda device, weights: blackbox.jpeg_size,
    "pickscore": _module("pickscore"),
    "tiny-aesthetic": _tiny_aesthetic,
    "tiny-alignment": _tiny_alignment,
}
AVAILABLE = tuple(BUILT_IN)


@dataclass(frozen=True)
class NamedReward:
    """A reward with its name (`experiment.reward_fn`), whose results are checked.

    differentiable: False for a black box, which is called without gradients and may return numbers
    of any kind (list, numpy). made_with: the options (dotted names) that it was built with.
    """

    name: str
    function: Reward
    differentiable: bool = True
    made_with: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """images [B, 3, H, W] -> [B]. Raises ConfigError when the result is of no use."""
        if not self.differentiable:
            return self._values(images, prompts, metadata)
        value = self.function(images, prompts, metadata)
        self._check_shape(value, images)
        if wants_gradient(images) and not value.requires_grad:
            raise ConfigError(
                f"the reward {self.name} has no gradient with respect to the images: remove "
                "detach(), torch.no_grad() or conversions to numpy or PIL from it, or mark it "
                "with differentiable = False"
            )
        return value

    def _check_shape(self, value: object, images: Tensor) -> None:
        if isinstance(value, Tensor) and value.shape == (len(images),):
            return
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"the reward {self.name} must return a tensor of shape [{len(images)}], one score "
            f"per image, not {shape}"
        )

    def _values(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """A black box's scores, [B] float32 on the images' device."""
        if wants_gradient(images):
            raise no_gradient(self.name, "this method")
        with torch.no_grad():
            found: Any = self.function(images.detach(), prompts, metadata)
        try:
            value = torch.as_tensor(found, dtype=torch.float32, device=images.device)
        except (TypeError, ValueError, RuntimeError):
            value = found
        self._check_shape(value, images)
        return value

    def scores(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Scores:
        """The score, and the raw value of every component of a weighted sum; no gradient."""
        with torch.no_grad():
            if isinstance(self.function, Composition):
                return self.function.scores(images, prompts, metadata)
            return Scores(self(images, prompts, metadata), {})


def no_gradient(reward: str, method: str) -> ConfigError:
    """What a method says that needs a gradient where there is none."""
    return ConfigError(
        f"the reward {reward} gives values only, and {method} needs its gradient: use a method "
        "that needs values only, or --config.reward.zeroth_order=N to estimate the gradient from "
        "2N more values"
    )


def require_gradient(reward: Reward, method: str) -> None:
    """Raises ConfigError when `experiment.method` needs a gradient that the reward has not."""
    if not getattr(reward, "differentiable", True):
        raise no_gradient(getattr(reward, "name", "given"), f"config.experiment.method={method}")


def resolve(
    spec: str, device: torch.device, weights: str = "", settings: RewardSettings | None = None
) -> NamedReward:
    """The reward named by `experiment.reward_fn`: NAME, module:function, or a weighted sum.

    weights: a folder instead of the hub. settings: normalisation, thresholds, how gradients are
    composed and estimated (`reward.…`); default: none of these. Raises ConfigError, one line, when
    there is no such reward or its weights are missing.
    """
    settings = settings or RewardSettings()
    terms = parse(spec)
    components = tuple(Component(term.name, _nothing, term.weight) for term in terms)
    components = with_settings(components, settings.normalise, settings.clamp)
    for component in components:
        _check_name(spec, component.name)
    found = [_single(spec, c.name, device, weights, settings) for c in components]
    made = {f"reward.{key}": value for key, value in settings.model_dump().items()}
    made["reward.weights"] = weights
    if len(components) == 1 and components[0].plain:
        return replace(found[0], made_with=made)
    filled = tuple(
        Component(c.name, reward, c.weight, c.mean, c.std, c.low, c.high)
        for c, reward in zip(components, found, strict=True)
    )
    function = Composition(filled, settings.project_conflicts)
    return NamedReward(spec, function, all(reward.differentiable for reward in found), made)


def resolve_all(
    names: Sequence[str], device: torch.device, weights: str = ""
) -> dict[str, NamedReward]:
    """Rewards that are measured and not trained on, by name. Raises ConfigError like `resolve`."""
    return {name: resolve(name, device, weights) for name in names}


def check_names(spec: str) -> None:
    """Is every reward of `spec` known? Loads nothing. Raises ConfigError."""
    for term in parse(spec):
        _check_name(spec, term.name)


def _nothing(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
    raise AssertionError("stands in for a reward that is loaded later")


def _check_name(spec: str, name: str) -> None:
    """Raises ConfigError for a name that is none, before any weights are loaded."""
    if name in BUILT_IN or ":" in name:
        return
    near = difflib.get_close_matches(name, AVAILABLE, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"config.experiment.reward_fn={spec!r} is unknown: did you mean {near}? "
        "(your own: package.module:function)"
    )


def _single(
    spec: str, name: str, device: torch.device, weights: str, settings: RewardSettings
) -> NamedReward:
    function = BUILT_IN[name](device, weights) if name in BUILT_IN else _import(spec, name)
    reward = NamedReward(name, function, getattr(function, "differentiable", True))
    if reward.differentiable or not settings.zeroth_order:
        return reward
    estimated = ZerothOrder(
        reward, settings.zeroth_order, settings.zeroth_order_radius, settings.zeroth_order_grid
    )
    return NamedReward(name, estimated)


def named(reward: Reward) -> NamedReward:
    """Any callable as a checked reward, named by where it can be imported from.

    Raises ConfigError for what is none.
    """
    if isinstance(reward, NamedReward):
        return reward
    if not callable(reward):
        raise ConfigError(
            f"the reward {reward!r} is no function: give one that takes (images, prompts, metadata)"
        )
    place = reward if hasattr(reward, "__qualname__") else type(reward)
    name = f"{place.__module__}:{place.__qualname__}"
    return NamedReward(name, reward, getattr(reward, "differentiable", True))


def _import(spec: str, name: str) -> Reward:
    """The callable `package.module:function`. Raises ConfigError when it cannot be had."""
    given = f"config.experiment.reward_fn={spec!r}"
    found: Reward = import_object(name, given)
    if not callable(found):
        raise ConfigError(f"{given} is not callable")
    return found
