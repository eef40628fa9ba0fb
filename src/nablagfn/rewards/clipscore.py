"""CLIP score: cosine of picture and prompt by CLIP ViT-L/14, not clipped at 0 (a clip has no
gradient). Hessel et al. 2021 report 2.5 times it, by ViT-B/32.

Weights: `clip/` in `--config.reward.weights=FOLDER`, the same as for `aesthetic`.
"""

from __future__ import annotations

import torch
from transformers import CLIPModel, CLIPTokenizer

from .clip import ClipScore
from .pixels import shorter_side
from .weights import CLIP_L, Finder


def load(device: torch.device, weights: str = "") -> ClipScore:
    """About 0.1 (unrelated) to 0.35. Raises ConfigError when weights are missing."""
    finder = Finder("clipscore", weights)
    (folder,) = finder.find(CLIP_L)
    model = finder.pretrained(CLIPModel, folder)
    words = finder.words(CLIPTokenizer, folder, model.config.text_config.vocab_size)
    return ClipScore(model, words, shorter_side).to(device)
