"""The model to finetune."""

from __future__ import annotations

from pydantic import Field

from .base import Group


class Pretrained(Group):
    """The model to finetune."""

    model: str = Field(
        "runwayml/stable-diffusion-v1-5",
        min_length=1,
        description="hub name or folder of a pipeline of one of the families, or tiny-animals or "
        "tiny-animals-flow (shipped with nablagfn)",
    )
    family: str = Field(
        "auto",
        min_length=1,
        description="stable-diffusion, sdxl, sd3, flux, flux2, flux2-klein, qwen-image, sana, "
        "z-image, world, or package.module:object for your own; auto: the one that the model "
        "belongs to",
    )
    revision: str = Field("main", description="hub revision")
