"""Human Preference Score v2.1 (Wu et al. 2023, arXiv 2306.09341): cosine of a CLIP ViT-H-14
trained on human choices.

Built on transformers' CLIP with renamed weights rather than on open_clip: the same numbers, and no
torchvision. Weights: `HPS_v2.1_compressed.pt` and `clip/` (its tokenizer) in
`--config.reward.weights=FOLDER`, and `hpsv2.json` beside them for another size than ViT-H-14.
"""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from .clip import ClipScore
from .open_clip_names import to_transformers
from .pixels import longer_side
from .weights import CLIP_WORDS, HPS, Finder

_GELU = {"hidden_act": "gelu"}
VIT_H_14 = CLIPConfig(
    projection_dim=1024,
    text_config={
        **_GELU,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    vision_config={
        **_GELU,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
)


def load(device: torch.device, weights: str = "") -> ClipScore:
    """About 0.15 (poor) to 0.35. Raises ConfigError when weights are missing or do not fit."""
    finder = Finder("hpsv2", weights)
    state_at, words_at = finder.find(HPS, CLIP_WORDS)
    config = finder.config(CLIPConfig, "hpsv2.json") or VIT_H_14
    with init_empty_weights():
        model = CLIPModel(config)
    model = finder.fill(model, to_transformers(finder.read(state_at)), state_at)
    words = finder.words(CLIPTokenizer, words_at, config.text_config.vocab_size)
    return ClipScore(model, words, longer_side).to(device)
