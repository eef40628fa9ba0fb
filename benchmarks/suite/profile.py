"""The ten largest costs of an update of SD1.5, by phase and by kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from .child import Case, Setup
from .subject import one_update, paths, trainer_of

MOST = 10
SHORT = {
    "training.micro_batch": 8,
    "sampling.num_steps": 10,
    "model.timestep_fraction": 0.5,
}


def fast(setup: Setup) -> dict[str, Any]:
    """Seconds of own time; `waiting` is the clock's time in which the device had nothing to do.

    Ten steps are drawn instead of fifty, of which six of each path are learned from as usual: the
    profiler's own work grows with every kernel.
    """
    trainer = trainer_of(setup, {**paths(4), **SHORT})
    one_update(trainer)
    cuda = setup.device == "cuda"
    with torch_profile(
        activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    ) as found:
        update = one_update(trainer, warm=False)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [e for e in found.key_averages() if getattr(e, own) > 0]
    if cuda:  # kernels alone: an operator's row counts its kernels once more
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        events = [e for e in events if not e.is_user_annotation]
    events.sort(key=lambda e: -getattr(e, own))
    busy = sum(getattr(e, own) for e in events) / 1e6
    return {
        **update.figures(),
        "busy": busy,
        "waiting": max(0.0, update.seconds - busy),
        "largest": [
            {"name": e.key, "seconds": getattr(e, own) / 1e6, "calls": e.count}
            for e in events[:MOST]
        ],
    }


CASES: dict[str, Case] = {"fast": fast}
