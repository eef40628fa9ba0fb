"""Rewards that give values only: JPEG size, any black box; and an estimate of their gradient."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import rng
from ..core.surrogate import wants_gradient, with_gradient
from ..core.types import Metadata, Reward

JPEG_QUALITY = 95


def jpeg_size(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
    """Kilobytes of each picture as a JPEG of quality 95 (Black et al. 2024, DDPO); [B].

    images [B, 3, H, W]; clamped to [0, 1] and rounded to 8 bits here.
    """
    from PIL import Image

    sizes = []
    for image in (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu():
        buffer = io.BytesIO()
        Image.fromarray(image.numpy()).save(buffer, "JPEG", quality=JPEG_QUALITY)
        sizes.append(len(buffer.getvalue()) / 1000)
    return torch.tensor(sizes, device=images.device)


jpeg_size.differentiable = False  # type: ignore[attr-defined]


def blocks(coarse: Tensor, height: int, width: int) -> Tensor:
    """P: [B, 3, g, g] -> [B, 3, H, W], each entry over its block of pixels."""
    return F.interpolate(coarse, size=(height, width), mode="nearest")


def block_sizes(grid: int, height: int, width: int) -> Tensor:
    """PᵀP, a diagonal: pixels per block, [g, g]."""
    ones = torch.ones(1, 1, height, width, requires_grad=True)
    coarse = torch.zeros(1, 1, grid, grid, requires_grad=True)
    (count,) = torch.autograd.grad((blocks(coarse, height, width) * ones).sum(), coarse)
    return count[0, 0].detach()


def noise_of(image: Tensor, grid: int, pair: int) -> Tensor:
    """[3, g, g] standard normal; a function of the picture's pixels and `pair`, of nothing else."""
    pixels = image.detach().float().cpu().contiguous().numpy().tobytes()
    index = int.from_bytes(hashlib.blake2b(pixels, digest_size=7).digest(), "big")
    source = rng.generator(0, "zeroth-order", pair, index)
    return torch.randn(3, grid, grid, generator=source)


@dataclass(frozen=True)
class ZerothOrder:
    """A black box with an estimated gradient: antithetic differences along random directions
    (Nesterov & Spokoiny 2017), constant on grid × grid blocks.

        Ĝ = P (PᵀP)⁻¹ · 1/n Σ_j u_j · [r(x + ρPu_j) − r(x − ρPu_j)] / 2ρ,   u_j ~ N(0, 1)^{3g²}

    For small ρ its mean is the true gradient averaged over each block. One estimate is rough: its
    cosine to that mean is about √(n / (n + 3g² + 1)). Costs 2n values per gradient.
    pairs: n. radius: ρ, in pixel units of [0, 1]. grid: g.
    """

    function: Reward
    pairs: int
    radius: float
    grid: int

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """images [B, 3, H, W] -> [B]."""
        value = self.function(images.detach(), prompts, metadata)
        if not wants_gradient(images):
            return value
        return with_gradient(images, value, self.estimate(images.detach(), prompts, metadata))

    def estimate(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """Ĝ, [B, 3, H, W]."""
        height, width = images.shape[-2:]
        total = images.new_zeros(len(images), 3, self.grid, self.grid)
        for pair in range(self.pairs):
            noise = torch.stack([noise_of(image, self.grid, pair) for image in images])
            noise = noise.to(images)
            step = self.radius * blocks(noise, height, width)
            ahead = self.function(images + step, prompts, metadata)
            behind = self.function(images - step, prompts, metadata)
            slope = ((ahead - behind) / (2 * self.radius)).to(images)
            total += slope.reshape(-1, 1, 1, 1) * noise / self.pairs
        per_block = block_sizes(self.grid, height, width).to(images)
        return blocks(total / per_block.clamp(min=1), height, width)
