"""Random weights of the true architectures on both sides: ours and the reward's own package.

Widths are small for CI and full for `make parity-full`. Every parameter is drawn, biases and norms
too, so that no part can be left out unseen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipConfig, CLIPConfig

from tests import reference

CONTEXT, VOCABULARY = 77, 49408


@dataclass(frozen=True)
class ClipSize:
    """Both towers of a CLIP. patch: pixels of the picture tower's patches (of 224)."""

    embed: int
    width: int
    layers: int
    head: int
    text_width: int
    text_layers: int
    patch: int = 14

    def config(self, activation: str) -> CLIPConfig:
        """The same architecture in transformers."""
        return CLIPConfig(
            projection_dim=self.embed,
            text_config={
                "hidden_size": self.text_width,
                "intermediate_size": 4 * self.text_width,
                "num_hidden_layers": self.text_layers,
                "num_attention_heads": self.text_width // 64,
                "hidden_act": activation,
            },
            vision_config={
                "hidden_size": self.width,
                "intermediate_size": 4 * self.width,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.width // self.head,
                "hidden_act": activation,
                "patch_size": self.patch,
                "projection_dim": self.embed,
            },
        )


@dataclass(frozen=True)
class BlipSize:
    """BLIP's picture and text encoder."""

    width: int
    layers: int
    heads: int
    text_width: int
    text_layers: int
    text_heads: int

    def config(self) -> BlipConfig:
        """The same architecture in transformers."""
        return BlipConfig(
            text_config={
                "vocab_size": 30524,
                "hidden_size": self.text_width,
                "intermediate_size": 4 * self.text_width,
                "num_hidden_layers": self.text_layers,
                "num_attention_heads": self.text_heads,
                "encoder_hidden_size": self.width,
                "layer_norm_eps": 1e-12,
                "bos_token_id": 30522,
            },
            vision_config={
                "hidden_size": self.width,
                "intermediate_size": 4 * self.width,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "image_size": 224,
                "patch_size": 16,
                "layer_norm_eps": 1e-6,
            },
        )


VIT_L = {"small": ClipSize(64, 128, 2, 64, 64, 2), "full": ClipSize(768, 1024, 24, 64, 768, 12)}
VIT_H = {"small": ClipSize(64, 160, 2, 80, 64, 2), "full": ClipSize(1024, 1280, 32, 80, 1024, 24)}
BLIP = {
    "small": BlipSize(64, 2, 4, 48, 2, 4),
    "full": BlipSize(1024, 24, 16, 768, 12, 12),
}


def draw_weights(model: nn.Module, seed: int = 0) -> None:
    """Every parameter, in place: matrices with unit gain, vectors near 1 (norms) or 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            value = noise * (0.02 if "embedding" in name else parameter[0].numel() ** -0.5)
        elif ("norm" in name.lower() and name.endswith("weight")) or ".ln_" in name:
            value = 0.1 * noise + name.endswith("weight")
        else:
            value = 0.1 * noise
        if parameter.ndim > 0:
            parameter.data.copy_(value)
    model.eval().requires_grad_(False)


def openai_model(size: ClipSize) -> Any:
    """openai-clip's CLIP."""
    model = reference.openai_clip().model.CLIP(
        embed_dim=size.embed,
        image_resolution=224,
        vision_layers=size.layers,
        vision_width=size.width,
        vision_patch_size=size.patch,
        context_length=CONTEXT,
        vocab_size=VOCABULARY,
        transformer_width=size.text_width,
        transformer_heads=size.text_width // 64,
        transformer_layers=size.text_layers,
    )
    draw_weights(model)
    return model.float()


def hps_model(size: ClipSize) -> Any:
    """hpsv2's own CLIP."""
    package = reference.hpsv2_open_clip()
    model = package.model.CLIP(
        embed_dim=size.embed,
        vision_cfg=package.model.CLIPVisionCfg(
            image_size=224,
            layers=size.layers,
            width=size.width,
            head_width=size.head,
            patch_size=size.patch,
        ),
        text_cfg=package.model.CLIPTextCfg(
            context_length=CONTEXT,
            vocab_size=VOCABULARY,
            width=size.text_width,
            heads=size.text_width // 64,
            layers=size.text_layers,
        ),
        output_dict=True,
    )
    draw_weights(model)
    return model


def imagereward_model(size: BlipSize, folder: Path, tokenizer: Any) -> Any:
    """ImageReward's own class, with its BLIP at this size."""
    package = reference.blip()
    med = {
        "architectures": ["BertModel"],
        "hidden_act": "gelu",
        "hidden_size": size.text_width,
        "intermediate_size": 4 * size.text_width,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "model_type": "bert",
        "num_attention_heads": size.text_heads,
        "num_hidden_layers": size.text_layers,
        "pad_token_id": 0,
        "add_type_embeddings": False,
        "vocab_size": 30524,
        "encoder_width": size.width,
        "add_cross_attention": True,
    }
    path = folder / "med_config.json"
    path.write_text(json.dumps(med), encoding="utf-8")

    def vision(*_: Any, **__: Any) -> tuple[nn.Module, int]:
        vit = package.vit.VisionTransformer(
            img_size=224,
            patch_size=16,
            embed_dim=size.width,
            depth=size.layers,
            num_heads=size.heads,
            drop_path_rate=0.1,
        )
        return vit, size.width

    package.pretrain.create_vit = vision
    package.pretrain.init_tokenizer = lambda: tokenizer
    model = package.reward.ImageReward(str(path))
    model.mlp = package.reward.MLP(size.text_width)
    draw_weights(model)
    return model


@dataclass(frozen=True)
class Scored:
    """A score [B] and its gradient in the pixels [B, 3, H, W]."""

    value: Tensor
    gradient: Tensor


def scored(function: Any, images: Tensor) -> Scored:
    x = images.clone().requires_grad_()
    value = function(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return Scored(value.detach(), gradient)


def differences(ours: Scored, theirs: Scored) -> SimpleNamespace:
    """Relative: of the scores to their spread over the batch, of the gradients to their norm."""
    spread = theirs.value.std().clamp(min=1e-12)
    apart = (ours.gradient - theirs.gradient).flatten(1).norm(dim=1)
    return SimpleNamespace(
        score=float(((ours.value - theirs.value).abs() / theirs.value.abs()).max()),
        spread=float((ours.value - theirs.value).abs().max() / spread),
        gradient=float((apart / theirs.gradient.flatten(1).norm(dim=1)).max()),
    )
