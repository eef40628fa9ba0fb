"""The forms of an export: how each is written, and how it is loaded again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file

from ...config import Config
from ...models.stable_diffusion import StableDiffusionPolicy, load_pipeline
from .proof import set_sampler


@dataclass(frozen=True)
class Form:
    """write(policy, config, folder, name) fills the folder of a model called `name`;
    load(config, folder) makes a fresh pipeline from it."""

    write: Callable[[StableDiffusionPolicy, Config, Path, str], None]
    load: Callable[[Config, Path], Any]


def load_base(config: Config) -> Any:
    """The pretrained pipeline, afresh."""
    return load_pipeline(config.pretrained.model, config.pretrained.revision)


def _load_lora(config: Config, folder: Path) -> Any:
    (weights,) = folder.glob("*.safetensors")
    pipeline = load_base(config)
    pipeline.load_lora_weights(folder, weight_name=weights.name)
    return pipeline


def _write_diffusers(
    policy: StableDiffusionPolicy, config: Config, folder: Path, name: str
) -> None:
    policy.save(folder)


def _write_kohya(policy: StableDiffusionPolicy, config: Config, folder: Path, name: str) -> None:
    """lora_unet_….lora_down, .lora_up and .alpha, the keys of ComfyUI and AUTOMATIC1111."""
    named = {f"unet.{key}": value.detach().cpu() for key, value in policy.state_dict().items()}
    converted = convert_state_dict_to_kohya(named)
    plain = {key: value.float().contiguous() for key, value in converted.items()}
    save_file(plain, folder / f"{name}.safetensors")


def _write_fused(policy: StableDiffusionPolicy, config: Config, folder: Path, name: str) -> None:
    """The whole pipeline, the LoRA added to its weights, with the run's sampler."""
    with tempfile.TemporaryDirectory() as lora:
        policy.save(Path(lora))
        pipeline = _load_lora(config, Path(lora))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    set_sampler(pipeline, config)
    pipeline.save_pretrained(folder)


def _load_fused(config: Config, folder: Path) -> Any:
    return load_pipeline(str(folder))


FORMS = {
    "diffusers": Form(_write_diffusers, _load_lora),
    "kohya": Form(_write_kohya, _load_lora),
    "fused": Form(_write_fused, _load_fused),
}
