"""How far each picture has moved from the pretrained model's, prompt and noise being the same."""

from __future__ import annotations

from torch import Tensor


def feature_drift(x: Tensor, y: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean of ‖x_i − y_i‖ over pictures, ≥ 0; at most 2 for unit-length features.

    x: [n, D] features of the finetuned model's, y: [n, D] of the pretrained model's pictures of
    the same prompts and noise. Scalar, or [R] with counts [R, n].
    """
    distance = (x.double() - y.double()).norm(dim=1).cpu()
    if counts is None:
        return distance.mean()
    return counts.double() @ distance / counts.double().sum(1)
