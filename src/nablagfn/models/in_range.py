"""The border between float32 and a float16 network: cotangents cross it in float16's range.

A vector-Jacobian product is linear in its cotangent: Jᵀ(s·v)/s = Jᵀv. With s a power of two that
brings the largest entry of v to about `TARGET`, neither β nor σ nor ᾱ nor a loss's scale can
overflow float16 or sink below it. Both multiplications are made in float32, and are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

TARGET = 8.0  # in the middle of what was found to work, 2^-8 … 2^14 (docs/performance.md)
LEAST = 2.0**-100  # smaller cotangents are scaled as if they were this large
EXPONENT = 0x7F800000  # the bits of a float32 that hold its exponent


class Border:
    """The border of one float16 network with float32 parameters θ, which reach a loss through it.

    A backward pass that does not seek θ scales each row by itself: on its way in, and back on its
    way out. One that does sums rows inside, so all of it has one scale, chosen where it first
    comes to the border, and θ's gradients leave by hooks of their own.
    """

    def __init__(self, theta: Sequence[nn.Parameter]) -> None:
        self.theta = theta
        self._pass: tuple[int, Tensor | None] = (-1, None)  # its number; one scale, or by rows
        for parameter in theta:
            parameter.register_hook(self._leave_through_theta)

    def __call__(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """network(x), [M, ...], in the dtype of x; the network is given x in float16."""
        before = x.view_as(x)  # its own name for x, which may have gradients of other kinds
        after = network(before.to(torch.float16)).to(x.dtype)
        if not after.requires_grad:
            return after
        scale: list[Tensor] = []

        def enter(cotangent: Tensor) -> Tensor:
            scale[:] = [self._scale(cotangent)]
            return cotangent * scale[0]

        after.register_hook(enter)
        if before.requires_grad:
            before.register_hook(lambda product: product / scale[0])
        return after.view_as(after)  # whoever asks for its gradient gets the unscaled one

    def _scale(self, cotangent: Tensor) -> Tensor:
        here = torch._C._current_graph_task_id()
        if self._pass[0] != here:
            reaches = sought(self.theta)
            self._pass = (here, power_of_two(cotangent.abs().amax()) if reaches else None)
        common = self._pass[1]
        return rows(cotangent) if common is None else common

    def _leave_through_theta(self, gradient: Tensor) -> Tensor:
        came, common = self._pass
        if came != torch._C._current_graph_task_id():
            return gradient
        if common is None:
            raise RuntimeError("a backward pass reached θ that was taken for one to x only")
        return gradient / common


def rows(cotangent: Tensor) -> Tensor:
    """The scale of each row of [M, ...], as [M, 1, ...]."""
    largest = cotangent.abs().flatten(1).amax(1)
    return power_of_two(largest).reshape(-1, *([1] * (cotangent.ndim - 1)))


def power_of_two(largest: Tensor) -> Tensor:
    """s = 2^n with TARGET <= s·largest < 2·TARGET, elementwise; 1 for zero. What is not finite
    stays so: infinities get 0, which makes NaN of them, and NaN 1.
    """
    bits = largest.float().clamp(min=LEAST).view(torch.int32) & EXPONENT
    scale = (TARGET / bits.view(torch.float32)).to(largest.dtype)  # over 2^⌊log2 largest⌋
    return torch.where(largest > 0, scale, 1.0)


def sought(theta: Sequence[nn.Parameter]) -> bool:
    """Whether the backward pass now under way computes a gradient of any of `theta`."""
    return any(_sought(parameter) for parameter in theta if parameter.requires_grad)


def _sought(parameter: nn.Parameter) -> bool:
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
    except RuntimeError:  # how torch answers for a leaf that torch.autograd.grad was asked for
        return True
