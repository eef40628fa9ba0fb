"""The neural rewards shipped with tiny-animals (trained by `make tiny-animals`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core.types import Metadata
from .critics import AestheticCritic, AlignmentCritic

CRITICS = Path(__file__).parent.parent / "assets" / "tiny-animals" / "critics"


class TinyAesthetic:
    """How much a picture looks like the glossy 3-D style; ignores the prompt."""

    def __init__(self, device: torch.device) -> None:
        self.net = AestheticCritic.from_folder(CRITICS).to(device)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B]."""
        return self.net(images)


class TinyAlignment:
    """How well a picture fits its prompt (contrastive image-text score)."""

    def __init__(self, device: torch.device) -> None:
        self.net = AlignmentCritic.from_folder(CRITICS).to(device)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B]; row i is scored with prompts[i]."""
        return self.net(images, list(prompts))
