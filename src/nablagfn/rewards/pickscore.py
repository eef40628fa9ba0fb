"""PickScore v1 (Kirstain et al. 2023, arXiv 2305.01569): a CLIP ViT-H-14 trained on users' picks.

exp(logit_scale) · cosine, as its model card computes it. Weights: `pickscore/` (a transformers CLIP
folder with tokenizer) in `--config.reward.weights=FOLDER`.
"""

from __future__ import annotations

import functools

import torch
from transformers import CLIPModel, CLIPTokenizer

from .clip import ClipScore, as_is
from .pixels import shorter_side
from .weights import PICKSCORE, Finder


def load(device: torch.device, weights: str = "") -> ClipScore:
    """About 17 (poor) to 25. Raises ConfigError when weights are missing."""
    finder = Finder("pickscore", weights)
    (folder,) = finder.find(PICKSCORE)
    model = finder.pretrained(CLIPModel, folder)
    words = finder.words(CLIPTokenizer, folder, model.config.text_config.vocab_size)
    pixels = functools.partial(shorter_side, floor=True)
    return ClipScore(model, words, pixels, tidy=as_is, scaled=True).to(device)
