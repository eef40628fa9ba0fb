"""Pipelines without their weights: by configuration only, for planning, benchmarks and tests.

Built inside `torch.device("meta")` they take no memory; elsewhere their weights are random.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from ..config import ConfigError
from .clip_letters import clip_letters
from .latent_model import LatentModel
from .locate import INDEX, file_of, locate
from .published import PUBLISHED, sd15
from .stable_diffusion import StableDiffusion

WEIGHTLESS = ("scheduler",)  # its numbers are needed
LEFT_OUT = ("tokenizer", "processor", "feature_extractor", "safety_checker", "image_encoder")


def by_configuration(model: type[LatentModel], name: str, revision: str = "main") -> Any:
    """The pipeline of `pretrained.model`, from the configurations beside its weights, or from those
    that are known (`published`). It has no tokenizers.

    Raises ConfigError when it is not there.
    """
    try:
        source = locate(name, revision)
    except ConfigError:
        if name in PUBLISHED:
            return assembled(model, PUBLISHED[name]())
        raise
    try:
        index = json.loads(file_of(source, INDEX, revision).read_text(encoding="utf-8"))
        parts = {
            part: _part(source, revision, part, *of)
            for part, of in index.items()
            if isinstance(of, list) and of[0] and not _left_out(part)
        }
    except (OSError, ValueError, AttributeError, ImportError) as error:
        if name in PUBLISHED:  # its index alone is here
            return assembled(model, PUBLISHED[name]())
        raise ConfigError(
            f"config.pretrained.model={name!r}: its configuration cannot be read ({error})"
        ) from None
    options = {key: value for key, value in index.items() if not isinstance(value, list)}
    return assembled(model, parts, options)


def assembled(
    model: type[LatentModel], parts: dict[str, Any], options: dict[str, Any] | None = None
) -> Any:
    """The pipeline of these parts; what is not among them is None."""
    kind: Any = model.pipeline_class
    expected, optional = kind._get_signature_keys(kind)
    given = {name: None for name in expected} | parts
    plain = {name: value for name, value in (options or {}).items() if name in optional}
    if "requires_safety_checker" in optional:
        plain["requires_safety_checker"] = False
    return kind(**given, **plain)


def random_sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 with random weights and a tokenizer that spells."""
    parts = {**sd15(), "tokenizer": clip_letters()}
    return assembled(StableDiffusion, parts)


def _left_out(part: str) -> bool:
    return any(part.startswith(name) for name in LEFT_OUT)


def _part(source: str, revision: str, part: str, library: str, kind: str) -> Any:
    """One part of random weights on torch's present device; a scheduler on the CPU."""
    found: Any = getattr(importlib.import_module(library), kind)
    if library == "diffusers":
        config = found.load_config(source, subfolder=part, revision=revision)
        with torch.device("cpu") if part in WEIGHTLESS else torch.get_default_device():
            return found.from_config(config)
    config = found.config_class.from_pretrained(source, subfolder=part, revision=revision)
    return found._from_config(config) if hasattr(found, "_from_config") else found(config)
