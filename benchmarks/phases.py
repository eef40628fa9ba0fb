"""Where the time of an update goes: a stopwatch that always runs for one named phase.

The policy, the reward and g_φ are wrapped, as `counting.py` wraps the policy; a backward pass
through one of them starts when its gradient arrives. Nothing of this is in the package.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from nablagfn.rewards import NamedReward

OTHER = "everything else"


class Stopwatch:
    """Adds the time since the last change to the phase that ran."""

    def __init__(self, place: torch.device) -> None:
        self.place, self.seconds = place, defaultdict[str, float](float)
        self.phase, self.since = OTHER, time.perf_counter()

    def change(self, phase: str) -> str:
        """Returns the phase that ended."""
        if self.place.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        before, self.phase, self.since = self.phase, phase, now
        return before

    @contextmanager
    def span(self, phase: str):
        before = self.change(phase)
        try:
            yield
        finally:
            self.change(before)

    def on_gradient(self, value: Tensor, phase: str) -> Tensor:
        """From the moment that the gradient of `value` is there, the time is `phase`'s."""
        if value.requires_grad:
            value.register_hook(lambda gradient: self.change(phase) and None)
        return value


class _Watched:
    """A policy whose parts are timed; everything else is the policy's own."""

    def __init__(self, policy: Any, watch: Stopwatch) -> None:
        self._policy, self._watch, self._frozen = policy, watch, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def output(self, *arguments: Any, **options: Any) -> Tensor:
        kind = "frozen U-Net" if self._frozen else "tuned U-Net"
        if not torch.is_grad_enabled() and not self._frozen:
            kind = "rollout"
        with self._watch.span(f"{kind}, forward"):
            eps = self._policy.output(*arguments, **options)
        return self._watch.on_gradient(eps, f"{kind}, backward")

    @contextmanager
    def reference(self):
        self._frozen = True
        try:
            with self._policy.reference():
                yield
        finally:
            self._frozen = False

    def decode(self, *arguments: Any, **options: Any) -> Tensor:
        with self._watch.span("VAE decode, forward"):
            images = self._policy.decode(*arguments, **options)
        return self._watch.on_gradient(images, "VAE decode, backward")

    def make_flow(self, *arguments: Any, **options: Any) -> nn.Module:
        flow = self._policy.make_flow(*arguments, **options)
        flow.register_forward_pre_hook(lambda *a: self._watch.change("flow, forward") and None)
        flow.register_forward_hook(self._flowed)
        return flow

    def _flowed(self, module: nn.Module, inputs: Any, out: Tensor) -> None:
        self._watch.change(OTHER)
        self._watch.on_gradient(out, "flow, backward")


class _Scored:
    """A reward that is timed."""

    def __init__(self, reward: NamedReward, watch: Stopwatch) -> None:
        self.reward, self.watch = reward, watch
        self.differentiable = reward.differentiable

    def __call__(self, *arguments: Any) -> Tensor:
        with self.watch.span("reward, forward"):
            value = self.reward(*arguments)
        return self.watch.on_gradient(value, "reward, backward")


WATCHES: list[Stopwatch] = []  # of this process: one


def watched(policy: Any, reward: NamedReward, place: torch.device) -> tuple[Any, NamedReward]:
    watch = Stopwatch(place)
    WATCHES.append(watch)
    timed = NamedReward(reward.name, _Scored(reward, watch), reward.differentiable)
    return _Watched(policy, watch), timed


def profile(trainer: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Seconds by phase, and the five operators of most own time by torch.profiler."""
    (watch,) = WATCHES
    optimizer.register_step_pre_hook(lambda *a: watch.change("optimizer") and None)
    optimizer.register_step_post_hook(lambda *a: watch.change(OTHER) and None)
    watch.seconds.clear()
    watch.change(OTHER)
    kinds = [ProfilerActivity.CPU]
    cuda = watch.place.type == "cuda"
    if cuda:
        kinds.append(ProfilerActivity.CUDA)
    with torch_profile(activities=kinds) as found:
        trainer.fit()
    watch.change(OTHER)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda e: -getattr(e, own))
    return {
        "phases": dict(sorted(watch.seconds.items(), key=lambda item: -item[1])),
        "operators": {e.key: getattr(e, own) / 1e6 for e in events[:5]},
    }
