"""The families by name: one entry each. Needs no torch."""

from __future__ import annotations

from ..config import Config, ConfigError
from ..config.dotted import find_object
from ..models.locate import pipeline_class
from .family import Family
from .stable_diffusion import STABLE_DIFFUSION
from .world import WORLD

KEY = "config.pretrained.family"
FAMILIES = {family.name: family for family in (STABLE_DIFFUSION, WORLD)}


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
    for family in FAMILIES.values():
        if kind in family.pipelines:
            return family
    known = [kind for family in FAMILIES.values() for kind in family.pipelines]
    raise ConfigError(
        f"config.pretrained.model={model!r} is a {kind}; supported are {', '.join(known)}, or set "
        f"{KEY}=package.module:object for a family of your own"
    )


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
