"""A weights' folder for the real rewards: the true architectures with random weights, narrow.

The files have the published names and the published names of weights inside, so that what is tested
is what a user's folder goes through.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import BlipTextConfig, CLIPConfig, CLIPModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from nablagfn.rewards.aesthetic import Head
from tests.shared import WEIGHTS
from tests.tiny_pipeline import tokenizer

LAION = "sac+logos+ava1-l14-linearMSE.pth"
WIDTH, HEADS, PATCH, EMBED = 32, 2, 56, 768  # 768: the LAION head's file fits
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
BERT_ENTRIES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *LETTERS,
    *("##" + c for c in LETTERS),
]


def clip_config(activation: str) -> dict:
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "hidden_act": activation,
        "projection_dim": EMBED,
    }
    words = tokenizer()
    text = {
        "vocab_size": len(words),
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    return {
        "projection_dim": EMBED,
        "text_config": {**shared, **text},
        "vision_config": {**shared, "image_size": 224, "patch_size": PATCH},
    }


def save_clip(folder: Path, seed: int = 0) -> None:
    """A transformers CLIP folder with its tokenizer's two files."""
    torch.manual_seed(seed)
    CLIPModel(CLIPConfig(**clip_config("quick_gelu"))).save_pretrained(folder)
    words = tokenizer()
    entries = json.dumps(words.get_vocab())
    (folder / "vocab.json").write_text(entries, encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def block(prefix: str, names: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random weights: matrices with unit gain, norms near 1, biases near 0."""
    state = {}
    for name, shape in names.items():
        noise = torch.randn(shape)
        norm = name.rpartition(".")[0].endswith(("ln_1", "ln_2", "norm1", "norm2"))
        value = noise / shape[-1] ** 0.5 if len(shape) > 1 else 0.1 * noise
        state[prefix + name] = value + 1.0 if norm and name.endswith("weight") else value
    return state


def open_clip_block(prefix: str) -> dict[str, Tensor]:
    w = WIDTH
    return block(
        prefix,
        {
            "ln_1.weight": (w,),
            "ln_1.bias": (w,),
            "attn.in_proj_weight": (3 * w, w),
            "attn.in_proj_bias": (3 * w,),
            "attn.out_proj.weight": (w, w),
            "attn.out_proj.bias": (w,),
            "ln_2.weight": (w,),
            "ln_2.bias": (w,),
            "mlp.c_fc.weight": (4 * w, w),
            "mlp.c_fc.bias": (4 * w,),
            "mlp.c_proj.weight": (w, 4 * w),
            "mlp.c_proj.bias": (w,),
        },
    )


def hps_state() -> dict[str, Tensor]:
    """The weights of open_clip's CLIP by its own names."""
    state = {
        "positional_embedding": 0.1 * torch.randn(77, WIDTH),
        "token_embedding.weight": torch.randn(len(tokenizer()), WIDTH),
        "text_projection": torch.randn(WIDTH, EMBED) / WIDTH**0.5,
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": torch.randn(WIDTH),
        "visual.positional_embedding": torch.randn((224 // PATCH) ** 2 + 1, WIDTH),
        "visual.conv1.weight": torch.randn(WIDTH, 3, PATCH, PATCH) / (3 * PATCH**2) ** 0.5,
        "visual.proj": torch.randn(WIDTH, EMBED) / WIDTH**0.5,
    }
    for norm in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        state |= {f"{norm}.weight": torch.ones(WIDTH), f"{norm}.bias": torch.zeros(WIDTH)}
    for tower, index in itertools.product(("", "visual."), range(2)):
        state |= open_clip_block(f"{tower}transformer.resblocks.{index}.")
    return {name: value.half() for name, value in state.items()}  # as the published file


def blip_configs() -> dict:
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2}
    text = {"vocab_size": len(BERT_ENTRIES) + 2, "encoder_hidden_size": WIDTH}
    vision = {"image_size": 224, "patch_size": PATCH, "layer_norm_eps": 1e-6}
    return {
        "text_config": {
            **shared,
            **text,
            "num_attention_heads": HEADS,
            "bos_token_id": len(BERT_ENTRIES),
            "sep_token_id": 3,
        },
        "vision_config": {**shared, **vision, "num_attention_heads": HEADS},
    }


def imagereward_state() -> dict[str, Tensor]:
    """ImageReward.pt's names; with what only BLIP's pretraining used."""
    w = WIDTH
    text = BlipTextModel(BlipTextConfig(**blip_configs()["text_config"]), add_pooling_layer=False)
    state = {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    state |= {
        "blip.visual_encoder.cls_token": torch.randn(1, 1, w),
        "blip.visual_encoder.pos_embed": torch.randn(1, (224 // PATCH) ** 2 + 1, w),
        "blip.visual_encoder.patch_embed.proj.weight": torch.randn(w, 3, PATCH, PATCH) / 100,
        "blip.visual_encoder.patch_embed.proj.bias": torch.zeros(w),
        "blip.visual_encoder.norm.weight": torch.ones(w),
        "blip.visual_encoder.norm.bias": torch.zeros(w),
        "blip.vision_proj.weight": torch.randn(8, w),
        "blip.text_proj.weight": torch.randn(8, w),
    }
    for index in range(2):
        state |= block(
            f"blip.visual_encoder.blocks.{index}.",
            {
                "norm1.weight": (w,),
                "norm1.bias": (w,),
                "attn.qkv.weight": (3 * w, w),
                "attn.qkv.bias": (3 * w,),
                "attn.proj.weight": (w, w),
                "attn.proj.bias": (w,),
                "norm2.weight": (w,),
                "norm2.bias": (w,),
                "mlp.fc1.weight": (4 * w, w),
                "mlp.fc1.bias": (4 * w,),
                "mlp.fc2.weight": (w, 4 * w),
                "mlp.fc2.bias": (w,),
            },
        )
    head = {name: 4 * value for name, value in Head(w).state_dict().items()}
    return {**state, **{f"mlp.{name}": value for name, value in head.items()}}


def save_weights(folder: Path) -> Path:
    """Everything that the five real rewards look for. The LAION head is the true one where a
    developer has it."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    save_clip(folder / "clip")
    save_clip(folder / "pickscore", seed=1)
    if WEIGHTS is not None and (WEIGHTS / LAION).is_file():
        (folder / LAION).write_bytes((WEIGHTS / LAION).read_bytes())
    else:
        torch.save(Head().state_dict(), folder / LAION)
    torch.save({"state_dict": hps_state(), "epoch": 1}, folder / "HPS_v2.1_compressed.pt")
    (folder / "hpsv2.json").write_text(json.dumps(clip_config("gelu")), encoding="utf-8")
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(BERT_ENTRIES), encoding="utf-8")
    torch.save(imagereward_state(), folder / "ImageReward.pt")
    (folder / "imagereward.json").write_text(json.dumps(blip_configs()), encoding="utf-8")
    return folder
