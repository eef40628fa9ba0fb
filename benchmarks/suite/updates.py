"""Whole updates, warm: the three settings of the README with aesthetic; fast with the others."""

from __future__ import annotations

from functools import partial
from typing import Any

from .child import Case, Setup
from .subject import Options, measured, paths

FAST = paths(4)
SETTINGS: dict[str, Options] = {  # paths of an update as in the commands of the README
    "default": {**paths(4, 8), "sampling.batch_size": 16, "sampling.num_batches_per_epoch": 2},
    "fast": FAST,
    "no_flow": {**paths(4, 4), "model.no_flow": True},
}


def setting(setup: Setup, *, name: str) -> dict[str, Any]:
    small = {"default": FAST, "no_flow": {**FAST, "model.no_flow": True}}
    return measured(setup, small.get(name, FAST) if setup.small else SETTINGS[name])


def reward(setup: Setup, *, name: str) -> dict[str, Any]:
    """`fast` with another reward at full width."""
    return measured(setup, FAST, name)


CASES: dict[str, Case] = {
    **{name: partial(setting, name=name) for name in SETTINGS},
    **{name: partial(reward, name=name) for name in ("hpsv2", "imagereward")},
}
