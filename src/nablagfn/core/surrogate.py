"""Give scores a gradient that was found some other way than by differentiating them."""

from __future__ import annotations

import torch
from torch import Tensor


def wants_gradient(images: Tensor) -> bool:
    """Whether someone will differentiate what is computed from `images`."""
    return images.requires_grad and torch.is_grad_enabled()


def with_gradient(images: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """[B] equal to `value`, whose gradient in row i of `images` [B, ...] is gradient[i].

    value + ⟨x − stop(x), g⟩. First derivatives only.
    """
    moved = (images - images.detach()) * gradient.detach()
    return value.detach() + moved.flatten(1).sum(1)
