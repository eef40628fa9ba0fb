"""Randomness as a pure function of (seed, purpose, step, index): nothing to save, ranks differ.

`index` is the *global* index of a trajectory, so the same global batch is drawn whatever the
number of processes that share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_of(seed: int, purpose: str, step: int = 0, index: int = 0) -> int:
    """A 63-bit seed that differs whenever any argument does."""
    key = f"{seed}/{purpose}/{step}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, step: int = 0, index: int = 0) -> torch.Generator:
    """A CPU generator for one purpose. CPU, so that numbers do not depend on the device."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, step, index))


def normal(
    shape: tuple[int, ...],
    indices: Sequence[int],
    *,
    seed: int,
    purpose: str,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[len(indices), *shape] standard normal; row j depends on indices[j] only."""
    return torch.stack(
        [
            torch.randn(shape, generator=generator(seed, purpose, step, i), dtype=dtype)
            for i in indices
        ]
    )
