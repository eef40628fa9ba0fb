"""How pictures are looked at, and how they are made small enough to keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from ..core.types import View
from . import pictures
from .extractors import Extractor, embedded

THUMBNAIL = 128  # pixels of the longer side, at most


class PictureView(View):
    """Samples that are pictures: the features of an extractor, a grid of pictures."""

    def __init__(self, extractor: Extractor = embedded) -> None:
        self.extractor = extractor

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D]."""
        return self.extractor(images)

    def measures(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        return {}

    def save(self, images: Tensor, prompts: Sequence[str], path: Path, columns: int) -> None:
        """A grid with `columns` pictures in a row."""
        pictures.save_grid(images, path, columns)


def thumbnails(images: Tensor) -> Tensor:
    """[B, 3, H, W] shrunk to at most 128 pixels a side; other samples as they are."""
    if images.ndim != 4 or max(images.shape[-2:]) <= THUMBNAIL:
        return images
    height, width = images.shape[-2:]
    longer = max(height, width)
    size = (max(1, THUMBNAIL * height // longer), max(1, THUMBNAIL * width // longer))
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)
