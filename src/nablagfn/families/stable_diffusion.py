"""Stable Diffusion 1.x, 2.x and the like, and the shipped tiny-animals."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config, ConfigError
from ..models.locate import EMBEDDED, SD15, locate
from ..models.lora import FIRST_STATE, UNET
from .family import ExportForm, Family, StockSampler

if TYPE_CHECKING:
    import torch

    from ..core.types import Policy
    from ..models.latent import LatentPolicy

PIPELINE = "StableDiffusionPipeline"
FIRST_ORDER_SDE = {
    "algorithm_type": "sde-dpmsolver++",
    "solver_order": 1,
    "final_sigmas_type": "sigma_min",
}


def claims(model: str) -> bool:
    return model in EMBEDDED or model in SD15


def check(config: Config) -> None:
    """Raises ConfigError when the model is not there, and for options that exclude each other."""
    check_lora_strength(config)
    locate(config.pretrained.model, config.pretrained.revision)


def check_lora_strength(config: Config) -> None:
    """Raises ConfigError where a pass could not tell how strongly the LoRA acts on its rows."""
    varies = config.model.lora_variation
    if not varies:
        return
    for key, on in (
        ("training.gradient_checkpointing", config.training.gradient_checkpointing),
        ("speed.compile", config.speed.compile),
        ("speed.cuda_graphs", config.speed.cuda_graphs),
    ):
        if on:
            raise ConfigError(f"{varies} does not go with config.{key}=True: set one of them back")


def load(config: Config, device: torch.device, shard: bool) -> Policy:
    from ..models.stable_diffusion import StableDiffusionPolicy
    from ..models.tune import tune
    from ..runtime.distributed import weight_dtype

    policy = StableDiffusionPolicy.from_pretrained(
        config.pretrained.model,
        revision=config.pretrained.revision,
        dtype=weight_dtype(config, device),
        device=device,
        guidance_scale=config.sampling.guidance_scale,
        lora_rank=config.model.lora_rank,
        lora_targets=config.model.lora_targets,
        lora_until=config.model.lora_until,
        lora_fade=config.model.lora_fade,
        seed=config.seed,
        gradient_checkpointing=config.training.gradient_checkpointing,
        vae_checkpointing=config.training.vae_checkpointing,
        vae_slice=config.training.vae_slice,
        shard=shard,
    )
    tune(policy, config.speed)
    return policy


def skeleton(config: Config) -> LatentPolicy:
    from ..models.sd_architecture import by_configuration
    from ..models.stable_diffusion import StableDiffusionPolicy

    return StableDiffusionPolicy(
        by_configuration(config.pretrained.model, config.pretrained.revision),
        guidance_scale=config.sampling.guidance_scale,
        lora_rank=config.model.lora_rank,
        lora_targets=config.model.lora_targets,
        lora_until=config.model.lora_until,
        lora_fade=config.model.lora_fade,
        vae_checkpointing=config.training.vae_checkpointing,
    )


def stock_sampler(config: Config, times: Sequence[float] = ()) -> StockSampler:
    """times: of the run's steps; needed for a grid of ours, which is given to the scheduler.

    Raises ConfigError for a sampler that no scheduler of diffusers is.
    """
    name, eta = config.sampling.scheduler, config.sampling.eta
    if config.sampling.final_sigma:
        raise ConfigError(
            "no scheduler of diffusers ends at config.sampling.final_sigma="
            f"{config.sampling.final_sigma:g}: use `nablagfn sample`"
        )
    if config.sampling.spacing != "leading":
        return _with_times(config, times)
    if name == "dpm-solver":
        return StockSampler("DPMSolverMultistepScheduler", FIRST_ORDER_SDE)
    if name in ("ddim", "ddpm"):
        return StockSampler("DDIMScheduler", call={"eta": eta})
    raise ConfigError(
        f"no scheduler of diffusers draws as config.sampling.scheduler={name!r} does: use "
        "`nablagfn sample`"
    )


def _with_times(config: Config, times: Sequence[float]) -> StockSampler:
    """diffusers' one scheduler that takes times of any spacing, which draws with η = 1."""
    spacing = config.sampling.spacing
    if config.sampling.scheduler == "ddim" and config.sampling.eta != 1:
        raise ConfigError(
            f"no scheduler of diffusers draws with config.sampling.eta={config.sampling.eta:g} on "
            f"config.sampling.spacing={spacing}: use `nablagfn sample`"
        )
    if not times:
        raise ConfigError(f"the times of config.sampling.spacing={spacing} are not known here")
    return StockSampler(
        "DPMSolverMultistepScheduler",
        FIRST_ORDER_SDE,
        call={"timesteps": [round(time) for time in times]},
    )


def loading_code(config: Config) -> list[str]:
    """Lines that make `pipe`, the pretrained model."""
    name, revision = config.pretrained.model, config.pretrained.revision
    if name in EMBEDDED:
        return [
            "from nablagfn.models.locate import locate",
            f"pipe = {PIPELINE}.from_pretrained(",
            f"    locate({name!r}), safety_checker=None, requires_safety_checker=False)",
        ]
    given = "" if revision == "main" else f", revision={revision!r}"
    return [f"pipe = {PIPELINE}.from_pretrained({name!r}{given})"]


# ---------------------------------------------------------------------- forms of an export


def _pipeline(model: str, revision: str = "main") -> Any:
    from ..models.stable_diffusion import load_pipeline

    return load_pipeline(model, revision)


def _with_lora(config: Config, folder: Path) -> Any:
    (weights,) = (file for file in folder.glob("*.safetensors") if file.name != FIRST_STATE)
    pipeline = _pipeline(config.pretrained.model, config.pretrained.revision)
    pipeline.load_lora_weights(folder, weight_name=weights.name)
    return pipeline


def _write_diffusers(policy: LatentPolicy, config: Config, folder: Path, name: str) -> None:
    policy.model.save(folder, policy.lora())


def _write_kohya(policy: LatentPolicy, config: Config, folder: Path, name: str) -> None:
    """lora_unet_….lora_down, .lora_up and .alpha, the keys of ComfyUI and AUTOMATIC1111."""
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import save_file

    named = {f"unet.{key}": value.detach().cpu() for key, value in policy.lora().items()}
    converted = convert_state_dict_to_kohya(named)
    plain = {key: value.float().contiguous() for key, value in converted.items()}
    save_file(plain, folder / f"{name}.safetensors")


def _write_fused(policy: LatentPolicy, config: Config, folder: Path, name: str) -> None:
    """The whole pipeline, the LoRA added to its weights, with the run's sampler."""
    from ..core.grids import times_of
    from ..models.latent import set_sampler

    with tempfile.TemporaryDirectory() as lora:
        policy.save(Path(lora))
        pipeline = _with_lora(config, Path(lora))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    stock = stock_sampler(config, times_of(config.sampling, policy))
    set_sampler(pipeline, stock.scheduler, stock.options)
    pipeline.save_pretrained(folder)


def _load_fused(config: Config, folder: Path) -> Any:
    return _pipeline(str(folder))


STABLE_DIFFUSION = Family(
    "stable-diffusion",
    claims=claims,
    load=load,
    pipelines=(PIPELINE,),
    check=check,
    skeleton=skeleton,
    lora_targets=UNET,
    export_forms={
        "diffusers": ExportForm(_write_diffusers, _with_lora),
        "kohya": ExportForm(_write_kohya, _with_lora),
        "fused": ExportForm(_write_fused, _load_fused, always=True),
    },
    stock_sampler=stock_sampler,
    loading_code=loading_code,
    small=lambda model: model in EMBEDDED,
)
