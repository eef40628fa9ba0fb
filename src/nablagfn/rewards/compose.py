"""Several rewards as one: `0.7*hpsv2 + 0.3*aesthetic - 0.1*jpeg-size`.

r(x) = Σ_k w_k · (clamp(r_k(x), low_k, high_k) − mean_k) / std_k
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import ConfigError
from ..core.surrogate import wants_gradient, with_gradient
from ..core.types import Metadata, Reward

BETWEEN = re.compile(r"\s+([+-])\s+")
TERM = re.compile(r"\s*(?P<sign>[+-]?)\s*(?:(?P<factor>[^\s*]+)\s*\*)?\s*(?P<name>[^\s*]+)\s*")


@dataclass(frozen=True)
class Term:
    """One reward of a sum: its name and its weight, negative to minimise."""

    name: str
    weight: float


@dataclass(frozen=True)
class Scores:
    """total [B] is what is maximised; parts are the components' raw values by name, each [B]."""

    total: Tensor
    parts: dict[str, Tensor]


def parse(spec: str) -> tuple[Term, ...]:
    """The terms of `experiment.reward_fn`. Raises ConfigError, one line."""
    pieces = BETWEEN.split(spec)
    signs = ["+", *pieces[1::2]]
    terms = tuple(_term(spec, s, text) for s, text in zip(signs, pieces[::2], strict=True))
    names = [term.name for term in terms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"config.experiment.reward_fn={spec!r}: {twice} is named twice")
    return terms


def _term(spec: str, sign: str, text: str) -> Term:
    found = TERM.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"config.experiment.reward_fn={spec!r}: {text.strip()!r} is no reward; write NAME, or "
            "NUMBER*NAME, with ' + ' or ' - ' between several"
        )
    weight = _number(found["factor"] or "1")
    if weight is None or weight == 0:
        raise ConfigError(
            f"config.experiment.reward_fn={spec!r}: the weight {found['factor']!r} must be a "
            "number other than 0"
        )
    negative = (sign == "-") != (found["sign"] == "-")
    return Term(found["name"], -weight if negative else weight)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Component:
    """A reward with its weight, its normalisation, and thresholds beyond which it does not count.

    mean, std, low and high are in the reward's own units.
    """

    name: str
    reward: Reward
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    low: float = -math.inf
    high: float = math.inf

    @property
    def plain(self) -> bool:
        """Nothing is done to the reward."""
        return replace(self, weight=1.0) == Component(self.name, self.reward) and self.weight == 1

    def scale(self, raw: Tensor) -> Tensor:
        """[B] -> [B], w · (clamp(r) − mean)/std; no gradient outside of the thresholds."""
        return self.weight * (raw.clamp(self.low, self.high) - self.mean) / self.std


def with_settings(
    components: Sequence[Component], normalise: Sequence[str], clamp: Sequence[str]
) -> tuple[Component, ...]:
    """Components with `reward.normalise` (NAME=MEAN/STD) and `reward.clamp` (NAME=LOW:HIGH).

    Raises ConfigError, one line, for an entry that cannot be read or names no component.
    """
    known = {component.name: component for component in components}
    for entry in normalise:
        name, mean, std = _entry("normalise", entry, "/", known)
        if mean is None or std is None or std <= 0:
            raise _unreadable("normalise", entry)
        known[name] = replace(known[name], mean=mean, std=std)
    for entry in clamp:
        name, low, high = _entry("clamp", entry, ":", known)
        low = -math.inf if low is None else low
        high = math.inf if high is None else high
        if low >= high:
            raise _unreadable("clamp", entry)
        known[name] = replace(known[name], low=low, high=high)
    return tuple(known.values())


FORMS = {"normalise": "NAME=MEAN/STD, STD above 0", "clamp": "NAME=LOW:HIGH, one may be left out"}


def _entry(
    key: str, entry: str, between: str, known: dict[str, Component]
) -> tuple[str, float | None, float | None]:
    """Name and two numbers; None for one that is left out. Raises ConfigError."""
    name, _, values = entry.strip().rpartition("=")
    first, found, second = values.partition(between)
    numbers = [_number(text) if text.strip() else None for text in (first, second)]
    unread = any(n is None and t.strip() for n, t in zip(numbers, (first, second), strict=True))
    if not name or not found or unread:
        raise _unreadable(key, entry)
    if name not in known:
        raise ConfigError(
            f"config.reward.{key}: {name!r} is not part of the reward; it has {', '.join(known)}"
        )
    return name, numbers[0], numbers[1]


def _unreadable(key: str, entry: str) -> ConfigError:
    return ConfigError(f"config.reward.{key}: {entry!r} is not of the form {FORMS[key]}")


def project_conflicts(gradients: Sequence[Tensor]) -> Tensor:
    """Σ_k of the gradients [B, ...], each freed of what points against the others.

    PCGrad (Yu et al. 2020, alg. 1), picture by picture; the others are visited in order, not at
    random, so that the result is a function of the pictures.
    """
    flat = [g.flatten(1) for g in gradients]
    total = torch.zeros_like(flat[0])
    for i, own in enumerate(flat):
        for j, other in enumerate(flat):
            if i != j:
                along = (own * other).sum(1, keepdim=True).clamp(max=0)
                own = own - along / other.square().sum(1, keepdim=True).clamp(min=1e-30) * other
        total = total + own
    return total.reshape(gradients[0].shape)


@dataclass(frozen=True)
class Composition:
    """The weighted sum. project: gradients by `project_conflicts` instead of their plain sum."""

    components: tuple[Component, ...]
    project: bool = False

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """images [B, 3, H, W] -> [B]."""
        if self.project and wants_gradient(images):
            return self._projected(images, prompts, metadata)
        return self.scores(images, prompts, metadata).total

    def scores(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Scores:
        """The sum and every component's raw value."""
        raw = {c.name: c.reward(images, prompts, metadata) for c in self.components}
        total = torch.stack([c.scale(raw[c.name]) for c in self.components]).sum(0)
        return Scores(total, raw)

    def _projected(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        values, gradients = [], []
        for component in self.components:
            x = images.detach().requires_grad_()
            value = component.scale(component.reward(x, prompts, metadata))
            gradients.append(torch.autograd.grad(value.sum(), x)[0])
            values.append(value.detach())
        return with_gradient(images, torch.stack(values).sum(0), project_conflicts(gradients))
