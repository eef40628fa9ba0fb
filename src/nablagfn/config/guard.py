"""Budgets of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Group


class GuardSettings(Group):
    """Budgets of the fixed-seed samples; beyond one of them a run is stopped or calmed. All off
    by default. The best checkpoint within the budgets is kept."""

    min_diversity: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the pretrained model's diversity that must be kept (0.85: 85 %); "
        "0: no budget",
    )
    max_path_kl: float = Field(
        0.0, ge=0, description="most KL of the sampling paths p_θ‖p_#, in nats; 0: no budget"
    )
    max_held_out_drop: float = Field(
        0.0,
        ge=0,
        description="how far a reward of evaluation.held_out_rewards may fall below its best, in "
        "standard deviations of the pretrained model's; 0: no budget",
    )
    patience: int = Field(
        1, ge=1, description="measurements in a row beyond a budget before the guard acts"
    )
    action: Literal["stop", "lower-beta"] = Field(
        "stop",
        description="what it does: stop, or lower-beta (and stop if three times do not help)",
    )
    beta_factor: float = Field(
        0.5, gt=0, lt=1, description="lower-beta: what β is multiplied by each time"
    )

    @property
    def active(self) -> bool:
        """Whether any budget is set."""
        return bool(self.min_diversity or self.max_path_kl or self.max_held_out_drop)
