"""Settings of particular methods."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat

from .base import Group


class MethodSettings(Group):
    """Settings of particular methods (`experiment.method`)."""

    return_lambda: float = Field(
        0.0,
        ge=0,
        le=1,
        description="nabla-db-lambda: λ of the return; 0 bootstraps after one step, 1 is the lean "
        "adjoint. Above 0 and without method.window every update sweeps whole trajectories",
    )
    window: int = Field(
        0,
        ge=0,
        description="nabla-db-lambda: learn from a window of this many consecutive transitions of "
        "each trajectory, with the λ-return inside it; 0: from transitions chosen by "
        "model.timestep_fraction",
    )
    flow_hint: bool = Field(
        True,
        description="nabla-db-lambda: the flow network also sees x̂, which the guess has computed",
    )
    step_weight: Literal["auto", "one", "std"] | NonNegativeFloat = Field(
        "auto",
        description="w_k of the matching loss: one, std (σ_k), or a number p for σ_k to the power "
        "of p; auto: one for nabla-db, std for the other matching methods",
    )
    guess: Literal["gradient", "shifted", "no-jacobian"] = Field(
        "gradient",
        description="how the reward guess gets from ∇r(x̂) to x: gradient (back through the model), "
        "shifted (the model once more at x + a·β∇r: exact for linear rewards, no backward pass) or "
        "no-jacobian (∇r(x̂) itself, also without a backward pass); for nabla-db and "
        "nabla-db-lambda",
    )
    shift_cap: float = Field(
        1.0,
        gt=0,
        description="longest shift of the shifted guess, in standard deviations of the noise in x; "
        "for method.guess=shifted",
    )
    guess_model: Literal["auto", "finetuned", "pretrained"] = Field(
        "auto",
        description="whose x̂ the reward guess uses; auto: finetuned for nabla-db, pretrained for "
        "nabla-db-lambda",
    )
    mirror: bool = Field(
        False,
        description="nabla-db-lambda without a sweep: v̂ is the mean of V at x_{k+1} and at its "
        "mirror image about the mean of the step that drew it, which cancels the odd part of that "
        "noise. A second guess for each transition",
    )
    clip_quantile: float = Field(
        1.0,
        gt=0,
        le=1,
        description="adjoint-matching, and nabla-db-lambda with a sweep: v̂ whose length in steps, "
        "σ_k‖v̂‖, is above this quantile of an update's transitions (in this process) is shortened "
        "to it; 1: any length. For paths that cross between modes, with gradients a hundred times "
        "as long as others",
    )
    vgg_boundary: float = Field(
        1e4,
        ge=0,
        description="vgg-flow: weight of the boundary loss ‖g_φ(x_N)‖² beside the consistency loss",
    )
    vgg_difference: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="vgg-flow: h of the finite differences in the consistency loss, in the time of "
        "the flow and, for a shift of x, as its root mean square. Larger for networks in bfloat16",
    )
    draft_steps: int = Field(
        10, ge=1, description="draft-k: K, the last steps that the reward's gradient passes"
    )
    draft_lv_samples: int = Field(
        2, ge=1, description="draft-lv: noisy copies of each sample at the last step"
    )
    refl_share: float = Field(
        0.25, gt=0, le=1, description="refl: the last share of the steps to draw the one step from"
    )
    clip_range: float = Field(1e-4, gt=0, description="ddpo: clip of the probability ratio")
    advantage_clip: float = Field(5.0, gt=0, description="ddpo: clip of the advantages")
    prompt_buffer: int = Field(
        32, ge=2, description="ddpo: rewards remembered per prompt for its mean and deviation"
    )
    prompt_min_count: int = Field(
        16, ge=2, description="ddpo: below this many rewards, the whole epoch's statistics are used"
    )
