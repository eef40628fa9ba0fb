"""The first state: a finetuned sampler may draw it from N(μ, s²), the pretrained one's is N(0, s²).

A schedule that leaves some signal in its first state (Stable Diffusion's leaves 7 % of the
amplitude) makes that state decide a part of the picture, above all its colours: signal leak
(Everaert et al., WACV 2024). No step of a policy changes what was decided before the first one; the
mean of the first state does, at a KL of its own, which comes before those of the steps:

    KL(N(μ, s²)‖N(0, s²)) = ½‖μ/s‖²
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .types import Policy

KEY = "first_state.mean"  # in a policy's state


class FirstState:
    """What a policy knows of its first state: mean, μ of the shape of a sample, or None for 0."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self._on = True

    @property
    def now(self) -> Tensor | None:
        """μ; None inside `reference`."""
        return self.mean if self._on else None

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside it the first state is the pretrained model's."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    def state_dict(self) -> dict[str, Tensor]:
        """Empty without a mean."""
        return {} if self.mean is None else {KEY: self.mean}

    def load(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take what is of the first state; the rest of the state."""
        self.mean = state.get(KEY)
        return {name: value for name, value in state.items() if name != KEY}


def mean_of(policy: Policy) -> Tensor | None:
    """μ of the policy as it is now, [...]; None for 0, also of a policy that has no `first`."""
    first = getattr(policy, "first", None)
    return first.now if isinstance(first, FirstState) else None


def drawn(noise: Tensor, std: float, mean: Tensor | None) -> Tensor:
    """x_0 = μ + s z of standard normal z, [B, ...]."""
    return std * noise if mean is None else std * noise + mean.to(noise.device, noise.dtype)


def kl(mean: Tensor, std: float) -> float:
    """KL(N(μ, s²)‖N(0, s²)) = ½‖μ/s‖² in nats."""
    return 0.5 * float((mean.double() / std).square().sum())


def log_ratio(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """log N(x; μ, s²)/N(x; 0, s²) = (x·μ − ½‖μ‖²)/s² of first states [B, ...], [B] float64."""
    flat, mu = x.flatten(1).double(), mean.to(x.device).flatten().double()
    return (flat @ mu - 0.5 * torch.dot(mu, mu)) / std**2
