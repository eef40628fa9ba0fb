"""What the networks of worlds see of the noise level."""

from __future__ import annotations

import torch
from torch import Tensor

OCTAVES = 4  # Fourier features sin, cos(2^j · angle), j < OCTAVES


def noise_octaves(alpha: Tensor, sigma: Tensor) -> Tensor:
    """sin and cos of the octaves of the noise angle arctan(σ/α), [M, 2·OCTAVES]; both [M, 1]."""
    octaves = 2.0 ** torch.arange(OCTAVES, device=alpha.device, dtype=alpha.dtype)
    angle = torch.atan2(sigma, alpha) * octaves
    return torch.cat([angle.sin(), angle.cos()], 1)
