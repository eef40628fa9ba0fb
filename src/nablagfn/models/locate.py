"""Find a pretrained pipeline, or say in one line what is missing, before anything is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..config import ConfigError
from ..runs.hub import hub_answers

EMBEDDED = {"tiny-animals": Path(__file__).parent.parent / "assets" / "tiny-animals"}

MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}

HELP = (
    "download it where there is network (`hf download {name}`), or give a folder "
    "with --config.pretrained.model=FOLDER, or the shipped model with "
    "--config.pretrained.model=tiny-animals"
)


def locate(name: str, revision: str = "main") -> str:
    """What diffusers' from_pretrained can load for `name`: a folder, or a hub name that is there.

    Raises ConfigError when it is neither an embedded model, nor a pipeline folder, nor on the hub.
    """
    if name in EMBEDDED:
        return str(EMBEDDED[name])
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        check_pipeline_folder(folder)
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(
            f"config.pretrained.model={name!r}: no such folder, and not a hub name (owner/name)"
        )
    return check_hub(name, revision)


def check_pipeline_folder(folder: Path) -> None:
    """Raises ConfigError unless `folder` holds a Stable-Diffusion-type pipeline."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ConfigError(
            f"config.pretrained.model={str(folder)!r}: no model_index.json in it; it must be a "
            "folder written by a diffusers pipeline's save_pretrained"
        )
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"config.pretrained.model={str(folder)!r}: its model_index.json is damaged"
        ) from None
    if kind != "StableDiffusionPipeline":
        raise ConfigError(
            f"config.pretrained.model={str(folder)!r} is a {kind}; only StableDiffusionPipeline "
            "(SD 1.x, 2.x and the like) is supported"
        )


def check_hub(name: str, revision: str) -> str:
    """The hub name under which the model is cached or can be fetched. Raises ConfigError if none.

    A name that has left the hub (`MOVED`) is looked for in the cache first, then under the new one.
    """
    names = list(dict.fromkeys((name, MOVED.get(name, name))))
    for candidate in names:
        if _has_index(candidate, revision, local=True):
            return candidate
    reason = "the hub cannot be reached"
    if hub_answers():
        for candidate in reversed(names):
            if _has_index(candidate, revision, local=False):
                return candidate
        reason = "the hub does not give it"
    raise ConfigError(
        f"config.pretrained.model={name!r} is not on this machine and {reason}: "
        + HELP.format(name=name)
    )


def _has_index(name: str, revision: str, *, local: bool) -> bool:
    """Whether model_index.json is in the cache (`local`), or can be fetched."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        hf_hub_download(name, "model_index.json", revision=revision, local_files_only=local)
    except (HfHubHTTPError, OSError, ValueError):  # also missing entries and malformed names
        return False
    return True


def critics_of(name: str) -> Path | None:
    """The folder of critics that came with a local pipeline, if it has one."""
    folder = EMBEDDED.get(name, Path(os.path.expanduser(name))) / "critics"
    return folder if (folder / "classifier.safetensors").is_file() else None
