"""Sample grids as PNG files."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

GAP = 2  # pixels between pictures


def to_uint8(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] (clamped here) -> uint8 [B, H, W, 3] on the CPU."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def grid(images: Tensor, columns: int = 0) -> Image.Image:
    """All pictures in rows of `columns` (0: about square) on white."""
    pixels = to_uint8(images)
    count, height, width, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for i, picture in enumerate(pixels.numpy()):
        place = (i % columns * (width + GAP), i // columns * (height + GAP))
        sheet.paste(Image.fromarray(picture), place)
    return sheet


def save_grid(images: Tensor, path: Path, columns: int = 0) -> None:
    """Write the grid as a PNG, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial.png")
    grid(images, columns).save(temporary)
    temporary.replace(path)
