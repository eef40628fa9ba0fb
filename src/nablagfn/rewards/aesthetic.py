"""The LAION aesthetic score: CLIP ViT-L/14 and a linear head, float32, differentiable.

Weights: `--config.reward.weights=FOLDER` with `clip/` (a transformers CLIP folder) and
`sac+logos+ava1-l14-linearMSE.pth`; otherwise the hub.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from ..config import ConfigError
from ..types import Metadata

CLIP = "openai/clip-vit-large-patch14"
HEAD_REPOSITORY = "trl-lib/ddpo-aesthetic-predictor"
HEAD_ON_HUB = "aesthetic-model.pth"
HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"
SIZE = 224
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
WIDTHS = (768, 1024, 128, 64, 16, 1)


class Head(nn.Module):
    """The MLP 768-1024-128-64-16-1; without activations, so dropout aside it is linear."""

    def __init__(self) -> None:
        super().__init__()
        linear = [nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS)]
        places = (0, 2, 4, 6, 7)  # the published file counts dropout layers
        self.layers = nn.ModuleDict({str(i): m for i, m in zip(places, linear, strict=True)})

    def forward(self, x: Tensor) -> Tensor:
        """[B, 768] -> [B]."""
        for layer in self.layers.values():
            x = layer(x)
        return x.squeeze(1)


def preprocess(images: Tensor) -> Tensor:
    """CLIP: shorter side to 224 (bicubic, antialiased), centre crop, normalise."""
    height, width = images.shape[-2:]
    scale = SIZE / min(height, width)
    size = (round(height * scale), round(width * scale))
    if size != (height, width):
        images = F.interpolate(
            images, size=size, mode="bicubic", antialias=True, align_corners=False
        )
    top, left = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
    images = images[..., top : top + SIZE, left : left + SIZE]
    mean, std = (images.new_tensor(v).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


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
        for part in ("clip", HEAD_FILE) if weights else ():
            if not (Path(weights) / part).exists():
                raise ConfigError(f"config.reward.weights={weights!r}: there is no {part} in it")
        try:
            clip = CLIPVisionModelWithProjection.from_pretrained(
                str(Path(weights) / "clip") if weights else CLIP
            )
            head = Head()
            state = torch.load(_head_file(weights), map_location="cpu", weights_only=True)
            head.load_state_dict(state)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"config.experiment.reward_fn='aesthetic': its weights cannot be loaded ({first}); "
                f"give --config.reward.weights=FOLDER with clip/ ({CLIP}) and {HEAD_FILE}"
            ) from None
        return cls(clip, head).to(device)

    def forward(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        embeds = self.clip(pixel_values=preprocess(images.float())).image_embeds
        return self.head(F.normalize(embeds, dim=-1))


def _head_file(weights: str) -> Path:
    if weights:
        return Path(weights) / HEAD_FILE
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(HEAD_REPOSITORY, HEAD_ON_HUB))
