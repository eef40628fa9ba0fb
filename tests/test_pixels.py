"""Preprocessing against Pillow, which the original packages resize with, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nablagfn.rewards import pixels

SHAPES = [(512, 512), (64, 64), (300, 517), (517, 301), (100, 333)]
STD = torch.tensor(pixels.STD)[:, None, None]
MEAN = torch.tensor(pixels.MEAN)[:, None, None]


def picture(height: int, width: int) -> Tensor:
    """[3, H, W] on 8-bit levels, with edges."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 12, 12, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="nearest")[0]
    fine = torch.rand(3, height, width, generator=generator)
    return ((0.8 * smooth + 0.2 * fine) * 255).round() / 255


def by_pillow(image: Tensor, height: int, width: int) -> Tensor:
    """Bicubic on floats, channel by channel ('F' images are not rounded)."""
    rows = [
        Image.fromarray(channel.numpy(), mode="F").resize((width, height), Image.Resampling.BICUBIC)
        for channel in image
    ]
    return torch.from_numpy(np.stack([np.asarray(row) for row in rows]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("shape", SHAPES)
def test_shorter_side_is_pillow_s_resize_and_a_centre_crop(shape: tuple[int, int]) -> None:
    height, width = shape
    image = picture(height, width)
    short = min(shape)
    size = (224 * height // short, 224 * width // short)
    resized = by_pillow(image, *size)
    top, left = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    expected = (resized[:, top : top + 224, left : left + 224] - MEAN) / STD
    found = pixels.shorter_side(image[None])[0]
    assert found.shape == (3, 224, 224)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("shape", SHAPES)
def test_longer_side_is_pillow_s_resize_in_black(shape: tuple[int, int]) -> None:
    height, width = shape
    scale = 224 / max(shape)
    size = (round(height * scale), round(width * scale))
    black = torch.zeros(3, 224, 224)
    top, left = (224 - size[0]) // 2, (224 - size[1]) // 2
    black[:, top : top + size[0], left : left + size[1]] = by_pillow(picture(height, width), *size)
    found = pixels.longer_side(picture(height, width)[None])[0]
    torch.testing.assert_close(found, (black - MEAN) / STD, rtol=0, atol=1e-4)


def test_odd_margins_are_split_as_the_packages_do() -> None:
    marks = torch.arange(9.0).expand(1, 3, 9, 9)
    assert pixels.centre_crop(marks, 6)[0, 0, 0, 0] == 2  # torchvision: 1.5 to the even 2
    assert pixels.centre_crop(marks, 6, floor=True)[0, 0, 0, 0] == 1
    assert (
        pixels.centre_crop(marks, 4)[0, 0, 0, 0]
        == pixels.centre_crop(marks, 4, floor=True)[0, 0, 0, 0]
    )


def test_at_224_only_normalisation_is_left() -> None:
    image = picture(224, 224)
    expected = (image - MEAN) / STD
    torch.testing.assert_close(pixels.shorter_side(image[None])[0], expected)
    torch.testing.assert_close(pixels.longer_side(image[None])[0], expected)


@pytest.mark.parametrize("function", [pixels.shorter_side, pixels.longer_side])
def test_the_gradient_reaches_pixels_outside_of_the_range_too(function) -> None:
    images = (torch.rand(1, 3, 40, 40) * 3 - 1).requires_grad_()
    (gradient,) = torch.autograd.grad(function(images).square().sum(), images)
    assert (gradient != 0).all()
    shifted = function(images.detach() + 0.25)  # linear: a shift of colour shifts the result
    change = (shifted - function(images.detach())) * STD
    torch.testing.assert_close(change, torch.full_like(change, 0.25), rtol=0, atol=1e-4)
