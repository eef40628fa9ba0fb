"""Count model evaluations, the unit in which methods of different cost are compared; and graphs
that torch.compile made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from .types import Condition, Policy


@dataclass
class Counts:
    """Since the last `take`: one per sample.

    model: passes through the denoiser, forward and backward alike (with frozen weights a backward
    pass computes one product per layer, as a forward pass does). decode: samples decoded.
    model_backward, decode_backward: how many passes went back through them.
    """

    model: int = 0
    decode: int = 0
    model_backward: int = 0
    decode_backward: int = 0

    def take(self) -> dict[str, float]:
        """The counts by metric name; starts again from zero."""
        found = {"model_evals": float(self.model), "decode_evals": float(self.decode)}
        self.model = self.decode = self.model_backward = self.decode_backward = 0
        return found


class _Counted:
    """A policy whose `output` and `decode` are counted; everything else is the policy's own."""

    def __init__(self, policy: Policy, counts: Counts) -> None:
        self._policy = policy
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def output(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self._counts.model += len(x)
        output = self._policy.output(x, time, condition)
        if output.requires_grad:
            output.register_hook(self._backward)
        return output

    def decode(self, x: Tensor) -> Tensor:
        self._counts.decode += len(x)
        images = self._policy.decode(x)
        if images.requires_grad:
            images.register_hook(self._decode_backward)
        return images

    def _backward(self, gradient: Tensor) -> None:
        self._counts.model += len(gradient)
        self._counts.model_backward += len(gradient)

    def _decode_backward(self, gradient: Tensor) -> None:
        self._counts.decode_backward += len(gradient)


def counted(policy: Policy, counts: Counts) -> Policy:
    """The same policy, its work added to `counts`."""
    return cast(Policy, _Counted(policy, counts))


def compilations() -> str:
    """What torch.compile has made so far in this process, in one line, with its graph breaks."""
    from torch._dynamo.utils import counters  # slow to import, seldom needed

    graphs, breaks = counters["stats"]["unique_graphs"], counters["graph_break"]
    line = f"torch.compile: {graphs} graphs, {sum(breaks.values())} graph breaks"
    return "; ".join([line, *(reason.splitlines()[0] for reason in breaks)])
