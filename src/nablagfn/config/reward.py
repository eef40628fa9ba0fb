"""Where rewards find their weights, and how several become one."""

from __future__ import annotations

from pydantic import Field

from .base import Group


class RewardSettings(Group):
    """Where rewards find their weights, and how several become one."""

    weights: str = Field(
        "",
        description="folder with the weights of rewards and feature extractors; empty: the hub",
    )
    normalise: tuple[str, ...] = Field(
        (),
        description="NAME=MEAN/STD for each reward to standardise, in its own units, before it is "
        "weighted",
    )
    clamp: tuple[str, ...] = Field(
        (),
        description="NAME=LOW:HIGH, in the reward's own units (one may be left out): beyond them "
        "the reward is constant and pulls no more",
    )
    project_conflicts: bool = Field(
        False, description="several rewards: drop the part of a gradient that opposes another's"
    )
    zeroth_order: int = Field(
        0,
        ge=0,
        description="n: pairs of values from which the gradient of a reward without one is "
        "estimated, roughly; 0: not",
    )
    zeroth_order_radius: float = Field(
        0.05, gt=0, le=1, description="ρ: size of the tried changes, in pixel units of [0, 1]"
    )
    zeroth_order_grid: int = Field(
        8, ge=1, le=512, description="g: the estimate is constant on g x g blocks of pixels"
    )
