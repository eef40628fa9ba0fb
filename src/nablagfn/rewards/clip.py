"""Scores by a CLIP's two encoders: cosine of picture and prompt (Radford et al. 2021)."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

import ftfy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from ..core.types import Metadata, beside

CONTEXT = 77  # tokens, start and end included


def clean(text: str) -> str:
    """openai-clip's and open_clip's cleaning: mojibake and curly quotes mended, HTML entities
    resolved twice. White space is the tokenizer's business."""
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def as_is(text: str) -> str:
    """transformers' way (PickScore): the tokenizer does all there is to do."""
    return text


class ClipScore(nn.Module):
    """images [B, 3, H, W] in [0, 1], prompts -> scale · cos(image, prompt) [B], float32.

    pixels: one of `pixels.py`. tidy: `clean` or `as_is`. scaled: multiply by the model's own
    temperature exp(logit_scale). Prompts longer than 75 tokens are cut.
    """

    def __init__(
        self,
        model: CLIPModel,
        words: CLIPTokenizer,
        pixels: Callable[[Tensor], Tensor],
        *,
        tidy: Callable[[str], str] = clean,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        self.model = model.float()
        self.words = words
        self.pixels = pixels
        self.tidy = tidy
        self.scaled = scaled
        self._texts: dict[str, Tensor] = {}
        model.text_model.eos_token_id = words.eos_token_id  # where it pools; some configs say 2
        self.requires_grad_(False).eval()

    def forward(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        cosine = (self.picture(images) * self.text(prompts)).sum(1)
        return self.model.logit_scale.exp() * cosine if self.scaled else cosine

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """What sees tensors only (`rewards.networks_of`)."""
        return (self.model.vision_model,)

    def picture(self, images: Tensor) -> Tensor:
        """Unit embeddings [B, D]."""
        pixels = self.pixels(images.to(self.model.logit_scale.dtype))
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token numbers [B, 77], on the CPU."""
        return self.words(
            [self.tidy(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=CONTEXT,
            return_tensors="pt",
        ).input_ids

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Unit embeddings [B, D]; each distinct prompt is encoded once. No gradient."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._texts]
        scale = self.model.logit_scale
        with torch.no_grad():
            for prompt in missing:
                tokens = self.tokens([prompt]).to(scale.device)
                pooled = self.model.text_model(input_ids=tokens).pooler_output
                embedding = F.normalize(self.model.text_projection(pooled), dim=-1)
                self.remember(prompt, embedding[0].cpu())
        return beside(torch.stack([self._texts[p] for p in prompts]), scale).to(scale.dtype)

    def remember(self, prompt: str, embedding: Tensor) -> None:
        """Use this unit embedding [D] instead of encoding the prompt."""
        self._texts[prompt] = embedding
