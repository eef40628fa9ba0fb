"""Find a pretrained pipeline, or say in one line what is missing, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import ConfigError

EMBEDDED = {"tiny-animals": Path(__file__).parent.parent / "assets" / "tiny-animals"}

HELP = (
    "download it where there is network (`huggingface-cli download {name}`), or give a folder "
    "with --config.pretrained.model=FOLDER, or the shipped model with "
    "--config.pretrained.model=tiny-animals"
)


def locate(name: str, revision: str = "main") -> str:
    """What diffusers' from_pretrained can load for `name`: a folder, or a hub name that is there.

    Raises ConfigError when it is neither an embedded model, nor a pipeline folder, nor on the hub.
    """
    if name in EMBEDDED:
        return str(EMBEDDED[name])
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_pipeline_folder(folder)
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(
            f"config.pretrained.model={name!r}: no such folder, and not a hub name (owner/name)"
        )
    check_hub(name, revision)
    return name


def check_pipeline_folder(folder: Path) -> None:
    """Raises ConfigError unless `folder` holds a Stable-Diffusion-type pipeline."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ConfigError(
            f"config.pretrained.model={str(folder)!r}: no model_index.json in it; it must be a "
            "folder written by a diffusers pipeline's save_pretrained"
        )
    kind = json.loads(index.read_text()).get("_class_name", "?")
    if kind != "StableDiffusionPipeline":
        raise ConfigError(
            f"config.pretrained.model={str(folder)!r} is a {kind}; only StableDiffusionPipeline "
            "(SD 1.x, 2.x and the like) is supported"
        )


def check_hub(name: str, revision: str) -> None:
    """Raises ConfigError unless the model's index is in the local cache or can be fetched."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, "model_index.json", revision=revision, local_files_only=True)
        return
    except (LocalEntryNotFoundError, EntryNotFoundError):
        pass
    try:
        hf_hub_download(name, "model_index.json", revision=revision, etag_timeout=5)
    except (HfHubHTTPError, EntryNotFoundError, OSError) as error:
        reason = "the hub cannot be reached" if _offline(error) else "the hub does not have it"
        raise ConfigError(
            f"config.pretrained.model={name!r} is not on this machine and {reason}: "
            + HELP.format(name=name)
        ) from None


def _offline(error: Exception) -> bool:
    response = getattr(error, "response", None)
    return response is None


def critics_of(name: str) -> Path | None:
    """The folder of critics that came with a local pipeline, if it has one."""
    folder = EMBEDDED.get(name, Path(name).expanduser()) / "critics"
    return folder if (folder / "classifier.safetensors").is_file() else None
