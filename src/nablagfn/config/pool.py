"""The pool of paths that is learned from with `training.source=pool`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Group, Lower


class PoolSettings(Group):
    """The pool (`training.source=pool`): paths of the pretrained model, drawn once, beside which
    some of the finetuned model's own are drawn now and then.
    """

    size: int = Field(
        720, ge=2, description="paths of the pretrained model per process; drawn once"
    )
    images_per_prompt: int = Field(
        16,
        ge=2,
        description="of them for each prompt, as the weights exp(βr) compare pictures of one "
        "prompt only; must divide pool.size",
    )
    tilt: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="τ: paths are taken in proportion to 1 − τ + τw, w their weight in the target; "
        "0: all alike. What is learned stays the same, its variance does not",
    )
    looks: int = Field(
        0,
        ge=0,
        description="states of a path at which the reward of the predicted clean sample is taken, "
        "evenly among those with some signal and some noise; a step is then judged by what it did "
        "to the reward expected, with the noise that it really had. A decode and a reward for each "
        "path and look, once. 0: by the path's end alone, with what that tells of the noise, which "
        "is biased where the sampler is not the inverse of the forward process",
    )
    ahead: int = Field(
        2, ge=0, description="looks from a step to the one by which it is judged; 0: the end"
    )
    directions: int = Field(
        64,
        ge=0,
        description="principal directions, of those in which ends differ that begin at one state, "
        "along which a step's noise is learned from with pool.looks; 0: all",
    )
    gradient: Annotated[Literal["carried", "linear"], Lower] = Field(
        "carried",
        description="nabla-db-pool, what a step aims at: carried: the reward's gradient at the end "
        "of each path, carried back along it; linear: that of the weight which is to be expected "
        "of a state by a linear fit of the reward over the pool's finished samples. It needs "
        "no gradient of the reward, has the noise of one step only, and is as good as the fit, "
        "whose share of the reward is printed",
    )
    shift_start: bool = Field(
        False,
        description="nabla-db-pool with pool.gradient=linear: the mean of the first state is "
        "finetuned, too, one for all prompts. Where a schedule leaves some signal there (7 % in "
        "Stable Diffusion's) it decides a part of the picture, above all its colours, before the "
        "first step. The pictures then begin at noise + that mean, in diffusers by `latents=`",
    )
    gradient_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="nabla-db-pool: share of the reward's gradient, carried back along the path, "
        "in what a step aims at; the rest is what its noise says, as in reward-weighted",
    )
    gradient_cap: float = Field(
        1.0,
        ge=0,
        description="nabla-db-pool: longest carried gradient, in standard deviations of the step "
        "(σ_k‖λ_{k+1}‖); longer ones are shortened to it; 0: any length",
    )
    renoise: float = Field(
        0.2,
        ge=0,
        le=1,
        description="states with a share ᾱ of signal up to this are drawn anew for each use, by "
        "the forward process from the path's next state; above it they are the path's own. 0, and "
        "with pool.looks or nabla-db-pool: none",
    )
    own_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="size of a draw of the finetuned model's own paths, as a share of pool.size; "
        "0: none",
    )
    refresh: int = Field(10, ge=1, description="epochs from one draw of own paths to the next")
    keep_draws: int = Field(
        2, ge=1, description="draws of own paths that are kept; older ones are dropped"
    )
