"""Parts of known models by their published configurations: random weights, or none on "meta".

They are for counting where a model is not on the machine; sources are in docs/models.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from .clip_letters import CLIP_TEXT

Parts = dict[str, Any]
CLIP_L = CLIPTextConfig(**{**CLIP_TEXT.to_dict(), "projection_dim": 768})
CLIP_BIG_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
)
T5_XXL = T5Config(
    d_model=4096,
    d_ff=10240,
    d_kv=64,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
    vocab_size=32128,
)
MISTRAL_SMALL = Mistral3Config(
    text_config={
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
    },
    vision_config={
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
        "image_size": 1540,
        "patch_size": 14,
    },
    multimodal_projector_bias=False,
    spatial_merge_size=2,
    tie_word_embeddings=False,
)


def _qwen3(width: int, feed_forward: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=tied,
    )


QWEN3_4B, QWEN3_8B = _qwen3(2560, 9728, tied=True), _qwen3(4096, 12288, tied=False)
QWEN_VL_7B = Qwen2_5_VLConfig(
    text_config={
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    vision_config={"hidden_size": 1280},
    tie_word_embeddings=False,
)


def _autoencoder(channels: int, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        **options,
    )


def _unet_scheduler(**options: Any) -> DDIMScheduler:
    with torch.device("cpu"):  # its numbers are needed
        return DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            **options,
        )


def _flow_scheduler(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    with torch.device("cpu"):
        return FlowMatchEulerDiscreteScheduler(**options)


def sd15() -> Parts:
    return {
        "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        "vae": _autoencoder(4, sample_size=512),
        "text_encoder": CLIPTextModel(CLIP_TEXT),
        "scheduler": _unet_scheduler(),
    }


def sdxl() -> Parts:
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    return {
        "unet": unet,
        "vae": _autoencoder(4, sample_size=1024, scaling_factor=0.13025),
        "text_encoder": CLIPTextModel(CLIP_TEXT),
        "text_encoder_2": CLIPTextModelWithProjection(CLIP_BIG_G),
        "scheduler": _unet_scheduler(timestep_spacing="leading"),
    }


def _sd3(transformer: SD3Transformer2DModel) -> Parts:
    vae = _autoencoder(
        16,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": CLIPTextModelWithProjection(CLIP_L),
        "text_encoder_2": CLIPTextModelWithProjection(CLIP_BIG_G),
        "text_encoder_3": T5EncoderModel(T5_XXL),
        "scheduler": _flow_scheduler(shift=3.0),
    }


def sd3_medium() -> Parts:
    transformer = SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )
    return _sd3(transformer)


def sd35_medium() -> Parts:
    transformer = SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    return _sd3(transformer)


def sd35_large() -> Parts:
    transformer = SD3Transformer2DModel(
        num_layers=38,
        num_attention_heads=38,
        caption_projection_dim=2432,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )
    return _sd3(transformer)


def flux1(guidance: bool) -> Parts:
    vae = _autoencoder(
        16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    return {
        "transformer": FluxTransformer2DModel(guidance_embeds=guidance),
        "vae": vae,
        "text_encoder": CLIPTextModel(CLIP_TEXT),
        "text_encoder_2": T5EncoderModel(T5_XXL),
        "scheduler": _flow_scheduler(**shift),
    }


def flux1_dev() -> Parts:
    return flux1(guidance=True)


def flux1_schnell() -> Parts:
    return flux1(guidance=False)


def _flux2(transformer: Flux2Transformer2DModel, text_encoder: Any) -> Parts:
    return {
        "transformer": transformer,
        "vae": AutoencoderKLFlux2(),
        "text_encoder": text_encoder,
        "scheduler": _flow_scheduler(shift=3.0, use_dynamic_shifting=True),
    }


def flux2_dev() -> Parts:
    return _flux2(Flux2Transformer2DModel(), Mistral3ForConditionalGeneration(MISTRAL_SMALL))


def flux2_klein_4b(distilled: bool = False) -> Parts:
    transformer = Flux2Transformer2DModel(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )
    return {**_flux2(transformer, Qwen3ForCausalLM(QWEN3_4B)), "is_distilled": distilled}


def flux2_klein_9b(distilled: bool = False) -> Parts:
    transformer = Flux2Transformer2DModel(
        num_layers=8,
        num_single_layers=24,
        num_attention_heads=32,
        joint_attention_dim=12288,
        guidance_embeds=False,
    )
    return {**_flux2(transformer, Qwen3ForCausalLM(QWEN3_8B)), "is_distilled": distilled}


def qwen_image() -> Parts:
    return {
        "transformer": QwenImageTransformer2DModel(),
        "vae": AutoencoderKLQwenImage(),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(QWEN_VL_7B),
        "scheduler": _flow_scheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ),
    }


SANA_OWNER = "Efficient-Large-Model"
SANA_600M = {
    "num_attention_heads": 36,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
ACROSS_HEADS = "rms_norm_across_heads"  # SANA-1.5's norm of queries and keys


def sana(pixels: int, **options: Any) -> Parts:
    """options: what differs from Sana-1.6B."""
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    vae = AutoencoderDC(
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    with torch.device("cpu"):
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    return {
        "transformer": SanaTransformer2DModel(sample_size=pixels // 32, **options),
        "vae": vae,
        "text_encoder": Gemma2Model(Gemma2Config()),  # its defaults are those of Gemma-2-2B
        "scheduler": scheduler,
    }


def z_image(shift: float) -> Parts:
    vae = _autoencoder(
        16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return {
        "transformer": ZImageTransformer2DModel(axes_lens=[1536, 512, 512]),
        "vae": vae,
        "text_encoder": Qwen3Model(QWEN3_4B),
        "scheduler": _flow_scheduler(shift=shift),
    }


PUBLISHED: dict[str, Callable[[], Parts]] = {
    "runwayml/stable-diffusion-v1-5": sd15,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": sd15,
    "stabilityai/stable-diffusion-xl-base-1.0": sdxl,
    "stabilityai/stable-diffusion-3-medium-diffusers": sd3_medium,
    "stabilityai/stable-diffusion-3.5-medium": sd35_medium,
    "stabilityai/stable-diffusion-3.5-large": sd35_large,
    "stabilityai/stable-diffusion-3.5-large-turbo": sd35_large,
    "black-forest-labs/FLUX.1-dev": flux1_dev,
    "black-forest-labs/FLUX.1-schnell": flux1_schnell,
    "black-forest-labs/FLUX.2-dev": flux2_dev,
    "black-forest-labs/FLUX.2-klein-base-4B": flux2_klein_4b,
    "black-forest-labs/FLUX.2-klein-base-9B": flux2_klein_9b,
    "black-forest-labs/FLUX.2-klein-4B": partial(flux2_klein_4b, distilled=True),
    "black-forest-labs/FLUX.2-klein-9B": partial(flux2_klein_9b, distilled=True),
    "Tongyi-MAI/Z-Image": partial(z_image, 6.0),
    "Tongyi-MAI/Z-Image-Turbo": partial(z_image, 3.0),
    "Qwen/Qwen-Image": qwen_image,
    "Qwen/Qwen-Image-2512": qwen_image,
    f"{SANA_OWNER}/Sana_600M_512px_diffusers": partial(sana, 512, **SANA_600M),
    f"{SANA_OWNER}/Sana_600M_1024px_diffusers": partial(sana, 1024, **SANA_600M),
    f"{SANA_OWNER}/Sana_1600M_512px_diffusers": partial(sana, 512),
    f"{SANA_OWNER}/Sana_1600M_1024px_diffusers": partial(sana, 1024),
    f"{SANA_OWNER}/Sana_1600M_1024px_BF16_diffusers": partial(sana, 1024),
    f"{SANA_OWNER}/SANA1.5_1.6B_1024px_diffusers": partial(sana, 1024, qk_norm=ACROSS_HEADS),
    f"{SANA_OWNER}/SANA1.5_4.8B_1024px_diffusers": partial(
        sana, 1024, qk_norm=ACROSS_HEADS, num_layers=60
    ),
}
