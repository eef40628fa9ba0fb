"""How trajectories are drawn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Group, Lower, Name


class Sampling(Group):
    """How trajectories are drawn."""

    num_steps: int = Field(50, ge=2, le=1000, description="N: denoising steps")
    eta: float = Field(1.0, gt=0, le=1, description="DDIM η; 1 is DDPM (exact); ddim only")
    sde_noise: float = Field(
        0.7,
        gt=0,
        le=2,
        description="a, the noise of flow-sde (its authors' 0.7) and of cps (at most 1); flow-sde "
        "forgets its first noise at √2",
    )
    guidance_scale: float = Field(
        5.0, ge=1, description="classifier-free guidance; 1 switches it off (half the cost)"
    )
    height: int = Field(
        0, ge=0, description="height of the pictures in pixels; 0: the pipeline's own"
    )
    width: int = Field(
        0, ge=0, description="width of the pictures in pixels; 0: the pipeline's own"
    )
    max_sequence_length: int = Field(
        0,
        ge=0,
        description="tokens of a prompt, for models that take T5 or a language model; 0: the "
        "pipeline's own. Fewer are cheaper",
    )
    batch_size: int = Field(16, ge=1, description="trajectories per sampling batch and process")
    num_batches_per_epoch: int = Field(4, ge=1, description="sampling batches per epoch")
    low_var_subsampling: bool = Field(
        True, description="stratify the choice of transitions over the trajectory"
    )
    scheduler: Annotated[str, Name] = Field(
        "ddpm",
        min_length=1,
        description="ddim (with sampling.eta), ddpm, dpm-solver (SDE-DPM-Solver++); of flow models "
        "also flow-sde and cps, Flow-GRPO's (with sampling.sde_noise; what they miss: "
        "docs/models.md); or package.module:object for your own",
    )
    spacing: Annotated[Literal["leading", "trailing", "logsnr", "angle"], Lower] = Field(
        "leading",
        description="where the steps lie: leading (the model's own grid in diffusers), trailing "
        "(equal steps of the time from the noisiest), logsnr (all steps weigh alike in the path "
        "KL) or angle (of arctan(σ/α))",
    )
    final_sigma: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="σ of the clean end: finished samples keep that much noise, and the target is "
        "blurred by it; without any the last step would have no density. 0: the model's own",
    )
