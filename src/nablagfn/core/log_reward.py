"""log R(x_N) = β·r(decode(x_N)): the value, a piece at a time, and with another decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .kernels import Step
from .surrogate import wants_gradient, with_gradient
from .types import Condition, Policy, Reward, beside

Value = Callable[[Tensor, Condition], Tensor]  # x̂ [M, ...] and its condition to [M]


def untempered() -> float:
    """β as it was set."""
    return 1.0


@dataclass(frozen=True)
class LogReward:
    """log R(x_N) = β·r(decode(x_N), own prompts): float32 whatever the policy computes in.

    β is scale times what `temper` says at the moment: the guard may have lowered it. piece:
    pictures at a time, 0 for all (`in_pieces`). decoder: what decodes predicted clean samples,
    instead of the policy; never x_N itself.
    """

    policy: Policy
    reward: Reward
    scale: float
    temper: Callable[[], float] = untempered
    piece: int = 0
    decoder: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x_clean: Tensor, condition: Condition) -> Tensor:
        """x_clean [M, ...] -> [M]. Pixels are not clamped: a clamp has no gradient outside."""
        if not self.piece:
            return self._value(x_clean, condition)
        return in_pieces(self._value, x_clean, condition, self.piece)

    def at_next(self, x_clean: Tensor, k: Step, condition: Condition) -> Tensor:
        """The same at x̂(x_{k+1}), [M]; rows that are x_N (k last) are decoded by the policy."""
        if self.decoder is None or len(k.noisy) == len(x_clean):
            return self(x_clean, condition)
        return by_level(self, replace(self, decoder=None), x_clean, k, condition)

    def plain(self) -> LogReward:
        """r itself, without β, decoded by the policy."""
        return replace(self, scale=1.0, temper=untempered, decoder=None)

    def of(self, reward: Tensor) -> Tensor:
        """β·r of rewards that were measured, of any shape."""
        return self.temper() * self.scale * reward

    def _value(self, x_clean: Tensor, condition: Condition) -> Tensor:
        images = (self.decoder or self.policy.decode)(x_clean)
        images = images if images.dtype == torch.float64 else images.float()
        return self.of(self.reward(images, condition.prompts, condition.metadata))


def in_pieces(value: Value, x: Tensor, condition: Condition, size: int) -> Tensor:
    """value(x, condition), [M], `size` rows at a time.

    Each piece is differentiated at once and its graph is gone before the next: one piece of decoder
    and reward in memory, and nothing is computed twice.
    """
    rows = torch.arange(len(condition)).split(size)
    pieces = zip(x.split(size), (condition[r] for r in rows), strict=True)
    if not wants_gradient(x):
        return torch.cat([value(part, where) for part, where in pieces])
    found = [differentiated(value, part.detach(), where) for part, where in pieces]
    return with_gradient(
        x,
        torch.cat([piece.value for piece in found]),
        torch.cat([piece.gradient for piece in found]),
    )


@dataclass(frozen=True)
class Differentiated:
    """A value [m] and its gradient [m, ...], both without graphs."""

    value: Tensor
    gradient: Tensor


def differentiated(value: Value, x: Tensor, condition: Condition) -> Differentiated:
    """The value at x, a leaf of its own, and its gradient."""
    x = x.requires_grad_()
    found = value(x, condition)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    return Differentiated(found.detach(), gradient)


def by_level(noisy: Value, clean: Value, x: Tensor, k: Step, condition: Condition) -> Tensor:
    """The rows of x [M, ...] that lead to noisy samples by one function, the others by another,
    [M]."""
    mask = torch.ones(len(x), dtype=torch.bool)
    mask[k.noisy] = False
    parts = []
    for rows, value in ((mask.nonzero()[:, 0], clean), (k.noisy, noisy)):
        if len(rows):
            parts.append((rows, value(x[beside(rows, x)], condition[rows])))
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return torch.cat([found for _, found in parts])[beside(order, x)]


def terminal_gradient(log_reward: Value, x_clean: Tensor, condition: Condition) -> Tensor:
    """∇ log F̃(x_N) = β·∇r(decode(x_N)), detached, [B, ...]."""
    x = x_clean.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(log_reward(x, condition).sum(), x)
    return gradient
