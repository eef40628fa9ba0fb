"""A pipeline of each family with random weights, small enough for a test: the true classes, narrow.

`TINY` has one maker for each family of diffusers' pipelines, and `pixels` what they draw.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import AddedToken, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.tiny_pipeline import make_pipeline, tokenizer

WIDTH, WORDS = 16, 8


def clip(kind: Any, width: int = WIDTH, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    words = tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=WORDS,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
        )
    )


def t5(width: int) -> tuple[T5EncoderModel, T5TokenizerFast]:
    torch.manual_seed(5)
    letters = [(chr(c), -3.0) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    words = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    config = T5Config(
        vocab_size=len(words), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2
    )
    return T5EncoderModel(config), words


def chat_words(said: str) -> Qwen2Tokenizer:
    """One token a byte. said: what the template makes of what a user says; a letter is beside it,
    so that an empty prompt has tokens, too."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Qwen2Tokenizer(vocab=letters)
    words.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}u{{ " + said + " }}{% endif %}{% endfor %}"
    )
    return words


def language_model(words: int, layers: int, width: int = WIDTH) -> dict[str, Any]:
    """Options of a small one."""
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }


def autoencoder(channels: int, **options: Any) -> AutoencoderKL:
    """Pictures of twice the latents' size."""
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        **options,
    )


def stable_diffusion() -> Any:
    return make_pipeline()


def sdxl() -> Any:
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 1),
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        use_linear_projection=True,
        norm_num_groups=4,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(4, scaling_factor=0.13025),
        text_encoder=clip(CLIPTextModel),
        text_encoder_2=clip(CLIPTextModelWithProjection, seed=7),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=scheduler,
    )


def sd3() -> Any:
    torch.manual_seed(3)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    encoder, words = t5(2 * WIDTH)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(4, scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, seed=7),
        tokenizer_2=tokenizer(),
        text_encoder_3=encoder,
        tokenizer_3=words,
    )
    return pipeline


def flux() -> Any:
    torch.manual_seed(4)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    encoder, words = t5(2 * WIDTH)
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(CLIPTextModel),
        tokenizer=tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=words,
    )


def flux2_parts(guidance: bool) -> dict[str, Any]:
    torch.manual_seed(4)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    vae.bn.running_mean.normal_()  # as of training: each channel of a latent has its own
    vae.bn.running_var.uniform_(0.5, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler}


def flux2() -> Any:
    """Its language model is read at layers 10, 20 and 30. The true processor of prompts also takes
    pictures, for which it needs torchvision; its tokenizer stands in for it."""
    parts, words = flux2_parts(guidance=True), chat_words("m.content[0].text")
    torch.manual_seed(6)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Mistral3Config(
        text_config={"model_type": "mistral", **language_model(len(words), layers=30)},
        vision_config={"model_type": "pixtral", "num_attention_heads": 2, **vision},
    )
    encoder = Mistral3ForConditionalGeneration(config)
    return Flux2Pipeline(text_encoder=encoder, tokenizer=words, **parts)


def flux2_klein() -> Any:
    """Its language model is read at layers 9, 18 and 27."""
    parts, words = flux2_parts(guidance=False), chat_words("m.content")
    torch.manual_seed(6)
    encoder = Qwen3ForCausalLM(Qwen3Config(**language_model(len(words), layers=27)))
    return Flux2KleinPipeline(text_encoder=encoder, tokenizer=words, **parts)


def qwen_words() -> Qwen2Tokenizer:
    """One token a byte, but one a word of the pipeline's template, as the true one has it: its
    beginning, which is left out, has 34."""
    blank = qwen_image_of(None, None)
    pieces = re.findall(r"<\|\w+\|>| \w+|\w{2,}|[,:\n]", blank.prompt_template_encode)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Qwen2Tokenizer(vocab=letters, padding_side="right")
    words.add_tokens([AddedToken(piece, normalized=False) for piece in dict.fromkeys(pieces)])
    return words


def qwen_vl(width: int, words: int) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(6)
    small = {"intermediate_size": 2 * width, "num_attention_heads": 2}
    text = {
        **small,
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [width // 8, width // 16, width // 16],
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen_image_of(encoder: Any, words: Any) -> QwenImagePipeline:
    torch.manual_seed(4)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift_terminal=0.02,
    )
    return QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=words, transformer=transformer
    )


def qwen_image() -> Any:
    words = qwen_words()
    return qwen_image_of(qwen_vl(2 * WIDTH, len(words)), words)


def gemma(width: int) -> tuple[Gemma2Model, GemmaTokenizer]:
    """One token a letter; others are unknown."""
    torch.manual_seed(8)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = {word: i for i, word in enumerate([*special, "▁", *letters])}
    words = GemmaTokenizer(vocab=vocabulary)
    words._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    config = Gemma2Config(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Gemma2Model(config), words


def sana() -> Any:
    torch.manual_seed(9)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=2 * WIDTH,
        sample_size=8,
        qk_norm="rms_norm_across_heads",
        timestep_scale=0.5,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.41407,
    )
    encoder, words = gemma(2 * WIDTH)
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return SanaPipeline(
        tokenizer=words, text_encoder=encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )


def z_image() -> Any:
    words = chat_words("m.content")
    torch.manual_seed(4)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(4, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(Qwen3Config(**language_model(len(words), layers=3))),
        tokenizer=words,
    )


def loaded(make: Callable[[], Any]) -> Callable[[], Any]:
    """Its pipeline as from_pretrained gives it: ready to draw, not to train."""

    def made() -> Any:
        pipeline = make()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return made


TINY: dict[str, Callable[[], Any]] = {
    "stable-diffusion": loaded(stable_diffusion),
    "sdxl": loaded(sdxl),
    "sd3": loaded(sd3),
    "flux": loaded(flux),
    "flux2": loaded(flux2),
    "flux2-klein": loaded(flux2_klein),
    "qwen-image": loaded(qwen_image),
    "sana": loaded(sana),
    "z-image": loaded(z_image),
}
SIDES = {"sana": 32}  # whose pipeline draws nothing smaller
TOKENS = 12  # of T5 and the like


def pixels(family: str) -> int:
    """The side of its pictures in tests."""
    return SIDES.get(family, 16)
