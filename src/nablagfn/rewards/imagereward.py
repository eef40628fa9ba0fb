"""ImageReward v1.0 (Xu et al. 2023, arXiv 2304.05977): the first token of BLIP's image-grounded
text encoder through a linear head, standardised.

Its own package does not import beside current transformers. Built here on transformers' BLIP
classes, whose parts have the same layers, with renamed weights. Weights: `ImageReward.pt` and
`bert/` (its tokenizer) in `--config.reward.weights=FOLDER`, and `imagereward.json` beside them for
another size than BLIP large.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import BertTokenizer, BlipConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from ..core.types import Metadata, beside
from .aesthetic import Head
from .pixels import shorter_side
from .weights import BERT_WORDS, IMAGEREWARD, Finder

TOKENS = 35  # of the prompt, start, end and padding included
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of raw scores on the training set
ADDED_WORDS = ("[DEC]", "[ENC]")  # BLIP's, after BERT's 30,522

BLIP_LARGE = BlipConfig(
    text_config={
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "encoder_hidden_size": 1024,
        "layer_norm_eps": 1e-12,
        "bos_token_id": 30522,
    },
    vision_config={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    },
)

PICTURE = (
    (r"^blip\.visual_encoder\.", "picture."),
    (r"^picture\.cls_token$", "picture.embeddings.class_embedding"),
    (r"^picture\.pos_embed$", "picture.embeddings.position_embedding"),
    (r"^picture\.patch_embed\.proj\.", "picture.embeddings.patch_embedding."),
    (r"^picture\.norm\.", "picture.post_layernorm."),
    (r"^picture\.blocks\.(\d+)\.attn\.proj\.", r"picture.encoder.layers.\1.self_attn.projection."),
    (r"^picture\.blocks\.(\d+)\.attn\.", r"picture.encoder.layers.\1.self_attn."),
    (r"^picture\.blocks\.(\d+)\.norm", r"picture.encoder.layers.\1.layer_norm"),
    (r"^picture\.blocks\.(\d+)\.", r"picture.encoder.layers.\1."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.", "head."),
)


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ImageReward.pt by the names of `ImageReward` here. What only BLIP's pretraining uses (the
    projections of its contrastive loss) and position numbers are left out, as the original does."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in PICTURE:
            name = re.sub(pattern, replacement, name)
        if name.startswith(("picture.", "text.", "head.")) and not name.endswith("position_ids"):
            renamed[name] = value
    return renamed


class ImageReward(nn.Module):
    """images [B, 3, H, W] in [0, 1], prompts -> (raw − mean)/std [B], about −2 to 2, float32."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.picture = BlipVisionModel(config.vision_config)
        self.text = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.head = Head(config.text_config.hidden_size)
        self.words: BertTokenizer | None = None
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, device: torch.device, weights: str = "") -> ImageReward:
        """Raises ConfigError when weights are missing or do not fit."""
        finder = Finder("imagereward", weights)
        state_at, words_at = finder.find(IMAGEREWARD, BERT_WORDS)
        config = finder.config(BlipConfig, "imagereward.json") or BLIP_LARGE
        with init_empty_weights():
            model = cls(config)
        model = finder.fill(model, to_transformers(finder.read(state_at)), state_at)
        size = config.text_config.vocab_size - len(ADDED_WORDS)
        return model.with_words(finder.words(BertTokenizer, words_at, size)).to(device)

    def with_words(self, words: BertTokenizer) -> ImageReward:
        """Use BERT's tokenizer `words`, after adding BLIP's two marks to it."""
        words.add_special_tokens({"bos_token": ADDED_WORDS[0]})
        words.add_tokens([ADDED_WORDS[1]], special_tokens=True)
        self.words = words
        return self

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """What sees tensors only (`rewards.networks_of`)."""
        return (self.picture, self.text)

    def tokens(self, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """input_ids and attention_mask, [B, 35] each, on the CPU; longer prompts are cut."""
        assert self.words is not None
        return self.words(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )

    def forward(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        weight = self.head.weight
        pixels = shorter_side(images.to(weight.dtype))
        seen = self.picture(pixel_values=pixels).last_hidden_state
        tokens = self.tokens(prompts)
        read = self.text(
            input_ids=beside(tokens["input_ids"], weight),
            attention_mask=beside(tokens["attention_mask"], weight),
            encoder_hidden_states=seen,
            encoder_attention_mask=seen.new_ones(seen.shape[:2], dtype=torch.long),
            is_decoder=False,
        )
        return (self.head(read.last_hidden_state[:, 0]) - MEAN) / STD
