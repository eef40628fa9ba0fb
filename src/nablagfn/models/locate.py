"""Find a pretrained pipeline, or say in one line what is missing, before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..runs.hub import hub_answers

ASSETS = Path(__file__).parent.parent / "assets"
TINY_ANIMALS, TINY_ANIMALS_FLOW = "tiny-animals", "tiny-animals-flow"
EMBEDDED = {name: ASSETS / name for name in (TINY_ANIMALS, TINY_ANIMALS_FLOW)}

INDEX = "model_index.json"
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
SD15 = (*MOVED, *MOVED.values())  # names of Stable Diffusion 1.5, whose configuration is known

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
        class_in(folder / INDEX, name)
        return str(folder)
    if os.path.isfile(folder):
        raise ConfigError(
            f"config.pretrained.model={name!r} is a single file: a pipeline is a folder with "
            f"{INDEX} (a pipeline class's from_single_file(…).save_pretrained(FOLDER) makes one of "
            "a checkpoint; a GGUF file holds a quantised network, which cannot be finetuned here)"
        )
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(
            f"config.pretrained.model={name!r}: no such folder, and not a hub name (owner/name)"
        )
    return check_hub(name, revision)


def pipeline_class(name: str, revision: str = "main") -> str:
    """The class that `name` was saved by, as its model_index.json says. Raises ConfigError."""
    return class_in(file_of(locate(name, revision), INDEX, revision), name)


def file_of(source: str, path: str, revision: str = "main", *, cached: bool = False) -> Path:
    """A file of a pipeline that `locate` has found; of a folder it need not be there.

    cached: only if it lies on this machine. Raises OSError where the hub does not give it.
    """
    if os.path.isdir(source):
        return Path(source) / path
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, path, revision=revision, local_files_only=cached))


def class_in(index: Path, name: str) -> str:
    """The class that a model_index.json names. Raises ConfigError when there is none."""
    part = part_in(index.parent / "config.json")
    if not index.is_file() and part:
        raise ConfigError(
            f"config.pretrained.model={name!r} is a {part}, a part of a pipeline: give the folder "
            f"of a whole one, with {INDEX}"
        )
    if not index.is_file():
        raise ConfigError(
            f"config.pretrained.model={name!r}: no {INDEX} in it; it must be a folder written by a "
            "diffusers pipeline's save_pretrained"
        )
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"config.pretrained.model={name!r}: its {INDEX} is damaged") from None


def part_in(config: Path) -> str:
    """The class that a config.json of one part names (ControlNetModel and so on), or ""."""
    try:
        return str(json.loads(config.read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def config_in(
    source: str, path: str, revision: str = "main", *, cached: bool = False
) -> Mapping[str, Any]:
    """What stands in a JSON file of a pipeline (`file_of`); empty where that is not there."""
    try:
        file = file_of(source, path, revision, cached=cached)
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def missing_parts(source: str, revision: str = "main") -> list[str]:
    """The parts that a pipeline was saved without, which diffusers wants to be told again; what
    SD3 calls its T5, for example."""
    listed = config_in(source, INDEX, revision)
    absent = [name for name, value in listed.items() if value == [None, None]]
    return [name for name in absent if name.startswith(("text_encoder", "tokenizer"))]


def check_unet(name: str, source: str, revision: str = "main") -> None:
    """Raises ConfigError for a U-Net that is given more than the noisy latents."""
    seen = config_in(source, "unet/config.json", revision).get("in_channels")
    known = config_in(source, "vae/config.json", revision).get("latent_channels")
    if seen and known and seen != known:
        raise ConfigError(
            f"config.pretrained.model={name!r} has a U-Net of {seen} input channels for latents of "
            f"{known}, as those for inpainting, editing or depth have: it draws from another "
            "picture, and only a prompt is given here; take its text-to-image model"
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
        hf_hub_download(name, INDEX, revision=revision, local_files_only=local)
    except (HfHubHTTPError, OSError, ValueError):  # also missing entries and malformed names
        return False
    return True


def critics_of(name: str) -> Path | None:
    """The folder of critics that came with a local pipeline, if it has one; the embedded models
    draw the same things and share theirs."""
    home = EMBEDDED[TINY_ANIMALS] if name in EMBEDDED else Path(os.path.expanduser(name))
    folder = home / "critics"
    return folder if (folder / "classifier.safetensors").is_file() else None
