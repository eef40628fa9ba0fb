"""Load a pipeline of diffusers, whole, or by its configuration only."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState

from ..config import ConfigError
from .latent import LatentPolicy, quiet
from .latent_model import LatentModel, PipelineCall, vae_dtype
from .locate import locate, missing_parts


def load_pipeline(
    kind: type, model: str, revision: str = "main", dtype: torch.dtype = torch.float32
) -> Any:
    """The frozen pipeline by hub name, folder or embedded name. Raises ConfigError if missing."""
    source = locate(model, revision)
    options: dict[str, Any] = dict.fromkeys(missing_parts(source, revision), None)
    if "safety_checker" in kind._optional_components:  # type: ignore[attr-defined]
        options |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        with quiet():
            pipeline = kind.from_pretrained(  # type: ignore[attr-defined]
                source, revision=revision, dtype=dtype, **options
            )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config.pretrained.model={model!r} cannot be loaded ({error}); complete it with "
            f"`hf download {source}`, or give a folder written by save_pretrained"
        ) from None
    except ImportError as error:  # of a part that needs more, as FLUX.2-dev's processor of prompts
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"config.pretrained.model={model!r} cannot be loaded: {reason}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def policy_of(
    model: type[LatentModel],
    name: str,
    call: PipelineCall,
    *,
    revision: str = "main",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    shard: bool = False,
    offload: bool = False,
    **options: Any,
) -> LatentPolicy:
    """The pipeline `name` of a family as a policy. Raises ConfigError if it is missing.

    device: by default this process's accelerator, or the CPU where there is none. offload: the text
    encoders stay where they are (`LatentPolicy.offload_text_encoder`). options: those of
    `LatentPolicy`.
    """
    pipeline = load_pipeline(model.pipeline_class, name, revision, dtype)
    place(pipeline, model, dtype, device, shard=shard, offload=offload)
    return LatentPolicy(model(pipeline, call), name=name, shard=shard, **options)


def place(
    pipeline: Any,
    model: type[LatentModel],
    dtype: torch.dtype,
    device: torch.device | str | None,
    *,
    shard: bool = False,
    offload: bool = False,
) -> None:
    """Move the pipeline to the device; shard: but the network, which goes there part by part;
    offload: but the text encoders, which may not fit beside it."""
    if vae_dtype(model, dtype) != dtype:
        pipeline.vae.to(vae_dtype(model, dtype))
    device = device or PartialState(cpu=not torch.accelerator.is_available()).device
    encoders = [] if offload else [getattr(pipeline, name) for name in model.encoders]
    network = [] if shard else [model.network_of(pipeline)]
    for part in (pipeline.vae, *network, *encoders):
        if part is not None:
            part.to(device)
