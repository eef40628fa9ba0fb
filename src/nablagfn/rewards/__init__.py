"""Rewards: scores of images; `resolve` finds one by name, import path or weighted sum."""

from .compose import Scores
from .offload import components_of, modules_of, networks_of, offloaded
from .registry import (
    BUILT_IN,
    NamedReward,
    check_names,
    named,
    require_gradient,
    resolve,
    resolve_all,
)

__all__ = [
    "BUILT_IN",
    "NamedReward",
    "Scores",
    "check_names",
    "components_of",
    "modules_of",
    "named",
    "networks_of",
    "offloaded",
    "require_gradient",
    "resolve",
    "resolve_all",
]
