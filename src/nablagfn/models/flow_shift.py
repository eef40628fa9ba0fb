"""The shift of a flow model's noise levels towards noise (Esser et al. 2024, section 5.3.2)."""

from __future__ import annotations

import math

# σ of the clean end where every step has a density. Stable Diffusion's own is 0.029. At 0 the last
# step would have no noise, and near 0 it would make up nearly all of the path KL.
FLOW_END = 0.03


def shifted(sigma: float, shift: float) -> float:
    """sσ/(1 + (s − 1)σ), in 0..1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshifted(sigma: float, shift: float) -> float:
    """The σ that `shifted` takes there."""
    return sigma / (shift - (shift - 1) * sigma)


def shift_by_mu(mu: float, kind: str = "exponential") -> float:
    """s of diffusers' time_shift(μ): e^μ/(e^μ + 1/σ − 1), or with μ itself for kind "linear"."""
    return mu if kind == "linear" else math.exp(mu)


def shifted_times(num_steps: int, shift: float, end: float = FLOW_END) -> list[float]:
    """N falling σ from 1, without the end: steps that are equal before the shift."""
    last = unshifted(end, shift)
    return [shifted(1 + (last - 1) * k / num_steps, shift) for k in range(num_steps)]


def resolution_mu(
    tokens: int, base: int = 256, most: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float:
    """μ, linear in the number of a picture's tokens, as SD3, FLUX and Qwen-Image have it."""
    slope = (max_shift - base_shift) / (most - base)
    return tokens * slope + base_shift - slope * base
