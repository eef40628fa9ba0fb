"""The families by name: one entry each. Needs no torch."""

from __future__ import annotations

from ..config import Config, ConfigError
from ..config.dotted import find_object
from ..models.locate import pipeline_class
from .family import Family
from .flux import FLUX
from .flux2 import FLUX2, FLUX2_KLEIN
from .qwen_image import QWEN_IMAGE
from .sana import SANA
from .sd3 import SD3
from .sdxl import SDXL
from .stable_diffusion import STABLE_DIFFUSION
from .world import WORLD
from .z_image import Z_IMAGE

KEY = "config.pretrained.family"
OF_PICTURES = (
    "Inpaint",
    "Img2Img",
    "Image2Image",
    "ControlNet",
    "Control",
    "Edit",
    "Kontext",
    "Fill",
)
OF_VIDEO = ("Wan", "Video", "LTX", "CogVideo", "Mochi", "Animate", "Allegro", "SkyReels", "Cosmos")
FAMILIES = {
    family.name: family
    for family in (
        STABLE_DIFFUSION,
        SDXL,
        SD3,
        FLUX,
        FLUX2,
        FLUX2_KLEIN,
        QWEN_IMAGE,
        SANA,
        Z_IMAGE,
        WORLD,
    )
}


def find_family(config: Config) -> Family:
    """The family of `pretrained.family`, or the one that `pretrained.model` belongs to.

    Raises ConfigError when there is none, or when the model is not there to be asked.
    """
    name, model = config.pretrained.family, config.pretrained.model
    if name != "auto":
        return find_object(name, FAMILIES, KEY, Family)
    claiming = claimed(model)
    if claiming is not None:
        return claiming
    kind = pipeline_class(model, config.pretrained.revision)
    found = of_pipeline(kind)
    if found is None:
        raise ConfigError(f"config.pretrained.model={model!r} is a {kind}: {why_none(kind)}")
    return found


def of_pipeline(kind: str) -> Family | None:
    """The family that a class of diffusers belongs to."""
    return next((family for family in FAMILIES.values() if kind in family.pipelines), None)


def check_belongs(config: Config, family: Family) -> None:
    """Raises ConfigError for a model of another family than the one that was asked for."""
    if not family.pipelines:
        return
    model = config.pretrained.model
    kind = pipeline_class(model, config.pretrained.revision)
    if kind in family.pipelines:
        return
    right = of_pipeline(kind)
    reason = f"set {KEY}={right.name}, or auto" if right else why_none(kind)
    raise ConfigError(
        f"config.pretrained.model={model!r} is a {kind}, which {KEY}={family.name} is not for: "
        f"{reason}"
    )


def why_none(kind: str) -> str:
    """Why there is no family for a class of diffusers, and what to do."""
    known = sorted({kind for family in FAMILIES.values() for kind in family.pipelines})
    supported = (
        f"supported are {', '.join(known)}, or set {KEY}=package.module:object for a family of "
        "your own"
    )
    if any(word in kind for word in OF_PICTURES):
        return f"it draws from another picture, and a prompt alone is given here; {supported}"
    if any(word in kind for word in OF_VIDEO):
        return (
            f"there is no family for video models (docs/models.md says what one needs); {supported}"
        )
    return f"there is no family for it; {supported}"


def claimed(name: str) -> Family | None:
    """The family that a model's, reward's or prompt set's name alone belongs to."""
    return next((family for family in FAMILIES.values() if family.claims(name)), None)


def family_of_run(config: Config) -> Family:
    """The same for a run that was made elsewhere: its model need not be here.

    Runs before families had names were of Stable Diffusion, or in a world.
    """
    if config.pretrained.family == "auto" and claimed(config.pretrained.model) is None:
        return STABLE_DIFFUSION
    return find_family(config)
