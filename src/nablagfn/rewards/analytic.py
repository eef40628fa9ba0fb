"""Rewards that are formulas: no weights, any image model, differentiable in the pixels.

All take images float [B, 3, H, W], nominally in [0, 1], ignore prompts and metadata, return [B].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.types import Metadata, beside

EPSILON = 1e-12  # keeps √0 differentiable on flat pictures


def _std(values: Tensor) -> Tensor:
    return (values.var(dim=1, unbiased=False) + EPSILON).sqrt()


def _luma(images: Tensor) -> Tensor:
    """Rec. 709 luma, [B, H·W]."""
    weights = torch.tensor([0.2126, 0.7152, 0.0722], dtype=images.dtype).reshape(1, 3, 1, 1)
    return (beside(weights, images) * images).sum(1).flatten(1)


def colourfulness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
    """M = √(σ_rg² + σ_yb²) + 0.3·√(μ_rg² + μ_yb²) (Hasler & Süsstrunk 2003, eq. for M^(3)).

    On pixels in [0, 1]: 0 is grey, 0.15 moderately, above 0.4 extremely colourful.
    """
    red, green, blue = images.flatten(2).unbind(1)
    rg = red - green
    yb = 0.5 * (red + green) - blue
    spread = (_std(rg).square() + _std(yb).square()).sqrt()
    offset = (rg.mean(1).square() + yb.mean(1).square() + EPSILON).sqrt()
    return spread + 0.3 * offset


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
    """Mean Rec. 709 luma: 0 black, 1 white."""
    return _luma(images).mean(1)


def warmth(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
    """Mean of red minus blue: -1 blue, 0 grey or green, 1 red or yellow."""
    return (images[:, 0] - images[:, 2]).mean(dim=(1, 2))


def contrast(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
    """Standard deviation of the luma over the picture: 0 flat, 0.5 black and white."""
    return _std(_luma(images))
