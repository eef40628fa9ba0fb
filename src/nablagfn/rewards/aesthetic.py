"""The LAION aesthetic score: CLIP ViT-L/14 and a linear head, float32, differentiable.

Weights: `clip/` (a transformers CLIP folder) and `sac+logos+ava1-l14-linearMSE.pth` in
`--config.reward.weights=FOLDER`; otherwise the hub.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from ..core.types import Metadata
from .pixels import shorter_side
from .weights import CLIP_L, LAION_HEAD, Finder

WIDTHS = (768, 1024, 128, 64, 16, 1)


class Head(nn.Module):
    """The MLP WIDTHS, from an embedding or a token to a number, with the published files' names.

    It has no activations, so dropout aside it is linear. ImageReward has the same.
    """

    def __init__(self, width: int = WIDTHS[0]) -> None:
        super().__init__()
        linear = [nn.Linear(a, b) for a, b in itertools.pairwise((width, *WIDTHS[1:]))]
        places = (0, 2, 4, 6, 7)  # the published files count dropout layers
        self.layers = nn.ModuleDict({str(i): m for i, m in zip(places, linear, strict=True)})

    @property
    def weight(self) -> Tensor:
        """The first layer's, for its dtype and device."""
        return next(self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """[B, width] -> [B]."""
        for layer in self.layers.values():
            x = layer(x)
        return x.squeeze(1)


class Aesthetic(nn.Module):
    """images [B, 3, H, W] in [0, 1] -> scores [B], about 1 (ugly) to 10; prompts are ignored."""

    def __init__(self, clip: CLIPVisionModelWithProjection, head: Head) -> None:
        super().__init__()
        self.clip = clip.float()
        self.head = head.float()
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, device: torch.device, weights: str = "") -> Aesthetic:
        """Raises ConfigError when CLIP or the head is neither in `weights` nor on the hub."""
        finder = Finder("aesthetic", weights)
        clip_at, head_at = finder.find(CLIP_L, LAION_HEAD)
        clip = finder.pretrained(CLIPVisionModelWithProjection, clip_at)
        head = Head(clip.config.projection_dim)
        finder.fill(head, finder.read(head_at), head_at)
        return cls(clip, head).to(device)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """What sees tensors only (`rewards.networks_of`)."""
        return (self.clip,)

    def forward(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        pixels = shorter_side(images.to(self.head.weight.dtype))
        embeds = self.clip(pixel_values=pixels).image_embeds
        return self.head(F.normalize(embeds, dim=-1))
