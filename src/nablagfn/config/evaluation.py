"""What is measured before and after a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Group


class Evaluation(Group):
    """The before/after measurement at the end of a run."""

    num_prompts: int = Field(8, ge=0, description="prompts measured before and after; 0: none")
    images_per_prompt: int = Field(
        4, ge=2, description="samples per prompt (at least 2: diversity needs pairs)"
    )
    seed: int = Field(1234, ge=0, description="seed of the evaluation samples")
    batch_size: int = Field(
        0, ge=0, description="samples drawn at once when measuring; 0: sampling.batch_size"
    )
    extractor: Literal["efficientnet-lite0", "clip", "dinov2", "dreamsim", "inception"] = Field(
        "efficientnet-lite0",
        description="network whose features measure diversity, drift and distance to the "
        "pretrained model; all but efficientnet-lite0 (inside the package) need weights",
    )
    held_out_rewards: tuple[str, ...] = Field(
        (),
        description="rewards that are measured and not trained on, separated by commas; they tell "
        "a better picture from an exploited reward",
    )
