"""Whole updates, warm: the three settings of the README with aesthetic; fast with the others."""

from __future__ import annotations

from functools import partial
from typing import Any

from update import SETTINGS

from .child import Case, Setup
from .subject import measured, paths

FAST = paths(4)


def setting(setup: Setup, *, name: str) -> dict[str, Any]:
    small = {"default": FAST, "no_flow": {**FAST, "model.no_flow": True}}
    return measured(setup, small.get(name, FAST) if setup.small else SETTINGS["sd15"][name])


def reward(setup: Setup, *, name: str) -> dict[str, Any]:
    """`fast` with another reward at full width."""
    return measured(setup, FAST, name)


CASES: dict[str, Case] = {
    **{name: partial(setting, name=name) for name in SETTINGS["sd15"]},
    **{name: partial(reward, name=name) for name in ("hpsv2", "imagereward")},
}
