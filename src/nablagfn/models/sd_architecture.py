"""Stable Diffusion without its weights: by configuration only, for planning, benchmarks and tests.

Built inside `torch.device("meta")` it takes no memory; elsewhere its weights are random.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..config import ConfigError
from .locate import SD15, locate

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
CLIP_TEXT = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)


def clip_letters() -> CLIPTokenizer:
    """CLIP's tokenizer without merges: words are spelt. End mark 49407 as in the true one."""
    entries = [*LETTERS, *(f"{c}</w>" for c in LETTERS)]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _pipeline(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text: CLIPTextModel
) -> StableDiffusionPipeline:
    with torch.device("cpu"):  # its numbers are needed
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=clip_letters(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 by its published configuration."""
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return _pipeline(unet, vae, CLIPTextModel(CLIP_TEXT))


def by_configuration(model: str, revision: str = "main") -> StableDiffusionPipeline:
    """The pipeline of `pretrained.model`, from the configurations beside its weights.

    Raises ConfigError when it is not there; Stable Diffusion 1.5 need not be.
    """
    try:
        source = locate(model, revision)
    except ConfigError:
        if model in SD15:
            return sd15()
        raise
    part = {"pretrained_model_name_or_path": source, "revision": revision}
    try:
        return _pipeline(
            UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(**part, subfolder="unet")
            ),
            AutoencoderKL.from_config(AutoencoderKL.load_config(**part, subfolder="vae")),
            CLIPTextModel(CLIPTextConfig.from_pretrained(**part, subfolder="text_encoder")),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config.pretrained.model={model!r}: its configuration cannot be read ({error})"
        ) from None
