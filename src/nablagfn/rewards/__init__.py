"""Rewards: differentiable scores of images; `resolve` finds one by name or import path."""

from .registry import BUILT_IN, NamedReward, named, resolve

__all__ = ["BUILT_IN", "NamedReward", "named", "resolve"]
