"""Rewards: scores of images; `resolve` finds one by name, import path or weighted sum."""

from .compose import Scores
from .registry import BUILT_IN, NamedReward, named, require_gradient, resolve

__all__ = ["BUILT_IN", "NamedReward", "Scores", "named", "require_gradient", "resolve"]
