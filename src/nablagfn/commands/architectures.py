"""The large rewards without their weights, for planning, benchmarks and tests.

Built inside `torch.device("meta")` they take no memory; elsewhere their weights are random.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ..models.clip_letters import CLIP_TEXT, LETTERS, clip_letters
from ..rewards.aesthetic import Aesthetic, Head
from ..rewards.clip import ClipScore
from ..rewards.hpsv2 import VIT_H_14
from ..rewards.imagereward import BLIP_LARGE, ImageReward
from ..rewards.pixels import longer_side, shorter_side

_VIT_L_14 = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=14,
    projection_dim=768,
)


def _bert_letters() -> BertTokenizer:
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    with tempfile.TemporaryDirectory() as folder:
        entries = "\n".join([*marks, *LETTERS, *("##" + c for c in LETTERS)])
        (Path(folder) / "vocab.txt").write_text(entries, encoding="utf-8")
        return BertTokenizer.from_pretrained(folder)


def aesthetic() -> Aesthetic:
    return Aesthetic(CLIPVisionModelWithProjection(_VIT_L_14), Head())


def clipscore() -> ClipScore:
    config = CLIPConfig(
        text_config=CLIP_TEXT.to_dict(), vision_config=_VIT_L_14.to_dict(), projection_dim=768
    )
    return ClipScore(CLIPModel(config), clip_letters(), shorter_side)


def clip_h() -> ClipScore:
    """HPSv2's CLIP; PickScore's has the same size."""
    return ClipScore(CLIPModel(VIT_H_14), clip_letters(), longer_side)


def imagereward() -> ImageReward:
    return ImageReward(BLIP_LARGE).with_words(_bert_letters())


REWARDS: dict[str, Callable[[], nn.Module]] = {
    "aesthetic": aesthetic,
    "clipscore": clipscore,
    "hpsv2": clip_h,
    "imagereward": imagereward,
    "pickscore": clip_h,
}
