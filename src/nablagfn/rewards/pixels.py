"""Pictures as the scorers were trained on them: resize, crop or pad, normalise; differentiable.

All take float [B, 3, H, W] in [0, 1] (not clamped) and return [B, 3, size, size], normalised with
CLIP's mean and deviation. The kernel is Pillow's: bicubic (a = -1/2), antialiased, float instead of
rounded to 8 bits; tests/parity measures what the rounding is worth.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.types import beside

SIZE = 224
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, antialiased, without corner alignment; the identity at the same size."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(
        images, size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )


def normalise(images: Tensor) -> Tensor:
    """(x − mean)/std per channel."""
    values = torch.tensor([MEAN, STD], dtype=images.dtype)
    mean, std = beside(values, images).reshape(2, 1, 3, 1, 1)
    return (images - mean) / std


def centre_crop(images: Tensor, size: int = SIZE, *, floor: bool = False) -> Tensor:
    """The middle [size, size]. An odd margin is split as torchvision does, or rounded down."""
    margins = [side - size for side in images.shape[-2:]]
    top, left = (m // 2 if floor else round(m / 2) for m in margins)
    return images[..., top : top + size, left : left + size]


def shorter_side(images: Tensor, size: int = SIZE, *, floor: bool = False) -> Tensor:
    """openai-clip, ImageReward, LAION: shorter side to `size`, centre crop. floor: transformers'
    centre (PickScore)."""
    height, width = images.shape[-2:]
    short = min(height, width)
    resized = resize(images, size * height // short, size * width // short)
    return normalise(centre_crop(resized, size, floor=floor))


def longer_side(images: Tensor, size: int = SIZE) -> Tensor:
    """hpsv2: longer side to `size`, black margins."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    resized = resize(images, round(height * scale), round(width * scale))
    down, across = size - resized.shape[-2], size - resized.shape[-1]
    margins = (across // 2, across - across // 2, down // 2, down - down // 2)
    return normalise(F.pad(resized, margins))
